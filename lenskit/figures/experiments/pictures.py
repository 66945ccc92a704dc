"""Which picture each experiment has, and of which of its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lenskit.figures.experiments.ablation import ablation_compared
from lenskit.figures.experiments.blocks import blocks_by_number, depth_by_size
from lenskit.figures.experiments.classes import causes_named, classes_compared
from lenskit.figures.experiments.labels import cost_frontier, labels_by_prompts
from lenskit.figures.experiments.tables import read_table
from lenskit.figures.experiments.ways import ways_compared


@dataclass(frozen=True)
class Drawing:
    """``draw`` makes the figure from the table ``of`` and, by argument, from further ``parts``.

    Tables are named by their files without ending; those of ``parts`` may be missing.
    """

    of: str
    draw: Callable[..., Figure]
    title: str
    parts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def tasks_compared(table: pd.DataFrame, **options: Any) -> Figure:
    """``ways_compared`` for prompts of tasks in the place of concepts."""
    named = table.rename(columns={"task": "concept_class", "n": "concepts"})
    return ways_compared(named, **{"unit": "prompts"} | options)


PROXIES = ("AUROC",)
_ASKED = ("not profiled", "profiled")
DRAWINGS: Mapping[str, Drawing] = MappingProxyType(
    {
        "main": Drawing("main", ways_compared, "The recipes over every concept"),
        "tokens": Drawing("tokens", ways_compared, "Which token a concept is read from"),
        "labels": Drawing("labels", labels_by_prompts, "Which labels a vector is learnt from"),
        "learners": Drawing(
            "learners",
            partial(ways_compared, beside=("seconds", "MiB")),
            "Which learner finds the direction",
        ),
        "blocks": Drawing(
            "blocks", blocks_by_number, "Which blocks are steered", {"ranking": "blocks-ranking"}
        ),
        "proxy": Drawing(
            "proxy",
            partial(ways_compared, measures=PROXIES, beside=("rank correlation",)),
            "Is attention to the prefix a proxy of the concept's activity?",
        ),
        "classes": Drawing(
            "classes",
            classes_compared,
            "Which concepts cannot be steered, and why",
            {"reasons": "classes-reasons", "predictors": "classes-predictors"},
        ),
        "recipe": Drawing(
            "recipe",
            partial(ways_compared, beside=("fixed coefficient", "less fluent")),
            "Recipes, and one part of lenskit's removed at a time",
        ),
        "loop": Drawing(
            "loop",
            partial(ways_compared, measures=("score",), beside=("less fluent", "strength")),
            "Steering only while it is needed",
        ),
        "policies": Drawing(
            "policies",
            partial(tasks_compared, measures=_ASKED, beside=("unrelated",)),
            "What makes a model look at a part of its prompt",
        ),
        "field": Drawing(
            "field",
            partial(tasks_compared, measures=_ASKED, beside=("unrelated",)),
            "Ways to teach a model a few prompts",
        ),
        "sources": Drawing(
            "sources",
            partial(tasks_compared, measures=("score",), beside=("repeated",)),
            "Where a steering vector comes from",
        ),
        "heads": Drawing(
            "heads",
            partial(tasks_compared, measures=("score",)),
            "Which heads are worth it",
        ),
        "composition": Drawing(
            "composition",
            partial(
                tasks_compared, measures=("together",), beside=("alone", "without"), unit="draws"
            ),
            "What edits lose beside one another",
        ),
        "sizes": Drawing(
            "sizes-by-block", depth_by_size, "Depth, by size or training", {"summary": "sizes"}
        ),
        "open-prefix": Drawing(
            "open-prefix", ways_compared, "Concepts whose prefix is weak or missing"
        ),
        "failures": Drawing(
            "failures",
            partial(ways_compared, beside=("unchanged", "repeated", "divergence")),
            "How steering fails",
        ),
        "failures-causes": Drawing(
            "failures-causes", causes_named, "Causes that were named", {"table": "failures"}
        ),
        "where": Drawing(
            "where",
            partial(ways_compared, beside=("unrelated tasks",)),
            "Which tokens are steered, and what it costs elsewhere",
        ),
        "cost": Drawing("cost", cost_frontier, "What quality costs"),
        "beyond-text": Drawing(
            "beyond-text",
            partial(ways_compared, unit="motifs"),
            "Sequences that are no language: planted motifs",
        ),
        "diagnosis": Drawing(
            "diagnosis",
            partial(causes_named, unit="cases"),
            "Planted faults and the causes named",
            {"table": "diagnosis-rightly"},
        ),
        "ablation": Drawing("ablation", ablation_compared, "What each ingredient brings"),
    }
)
"""Every picture of the experiments, by the name of its file."""


def draw_experiment(name: str, folder: str | Path) -> Figure:
    """The picture ``name`` (a key of ``DRAWINGS``) from the tables that lie in ``folder``.

    Raises KeyError for another name and FileNotFoundError where its table is not there.
    """
    if name not in DRAWINGS:
        raise KeyError(f"there is no picture {name!r}; there are {', '.join(DRAWINGS)}")
    drawing, folder = DRAWINGS[name], Path(folder)
    tables = {each: _read(folder / f"{file}.csv") for each, file in drawing.parts.items()}
    file = folder / f"{drawing.of}.csv"
    if not file.exists():
        raise FileNotFoundError(f"the picture {name!r} is made of {file}, which is not there")
    return drawing.draw(read_table(file), title=drawing.title, **tables)


def _read(file: Path) -> pd.DataFrame | None:
    return read_table(file) if file.exists() and file.stat().st_size > 1 else None
