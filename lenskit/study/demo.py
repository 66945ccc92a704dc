"""What ``lenskit demo`` runs: AGS's main comparison on the embedded model, offline, in minutes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from lenskit import figures
from lenskit.capture import capture
from lenskit.concepts import Concept, concepts, spread
from lenskit.enrichment import Enrichment, Null, enrich
from lenskit.models import EMBEDDED, load_model, model_fingerprint
from lenskit.prompts import PromptSet, build_prompts
from lenskit.selector import TokenSelection, select_tokens
from lenskit.study.cells import CellStore
from lenskit.study.engine import Group, Results, run_cells
from lenskit.study.pools import Processes
from lenskit.study.run import run_on_workers
from lenskit.study.study import KEYS, Study
from lenskit.study.ways import CONTROLS, Variant
from lenskit.vectors import LEARNERS, RecursiveFeatureMachine

PROCESSES = 2
CONCEPTS = 12  # of each class
PROMPTS = 160
# Said in full, so that other defaults change no picture.
COEFFICIENTS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13)
NULLS: tuple[Null, ...] = get_args(Null)
BY_TOKEN = tuple(
    Variant(token, "soft", "covariance", "all")
    for token in ("attention", "-1", "-2", "-3", "-4", "-5")
)
BY_LABELS = (
    Variant("attention", "hard", "mean difference", "all"),
    Variant("attention", "soft", "covariance", "all"),
    Variant("attention", "soft", "ridge", "all"),
    Variant("attention", "hard", "rfm", "all"),
    Variant("attention", "soft", "rfm", "all"),
)
CONTROLLED = tuple(replace(BY_LABELS[1], control=control) for control in CONTROLS)
VARIANTS = tuple(dict.fromkeys((*BY_TOKEN, *BY_LABELS, *CONTROLLED)))
OPTIONS: dict[str, Any] = {
    "coefficients": COEFFICIENTS,
    "relative": True,
    "prompts": PROMPTS,
    # Near ties are decided in float64 all the same.
    "learners": {**LEARNERS, "rfm": partial(RecursiveFeatureMachine, dtype="float32")},
}


@dataclass(frozen=True)
class Demo:
    """What the demonstration found; ``enrichments`` are by null, of a few concepts."""

    model: str
    study: Study
    selections: Mapping[tuple[str, str], TokenSelection]
    enrichments: Mapping[str, Sequence[Enrichment]]

    def figures(self) -> dict[str, Figure]:
        """The pictures, by file name."""
        table = self.study.compare()
        by_class = (BY_TOKEN[0], BY_TOKEN[1], BY_LABELS[-1], *CONTROLLED[1:3])
        classes: dict[str, list[TokenSelection]] = {}
        for (name, _), selection in self.selections.items():
            classes.setdefault(name, []).append(selection)
        return {
            "steerability_by_token": figures.steerability_bars(
                _rows(table, (*BY_TOKEN, *CONTROLLED)),
                title="Steerability by token choice (soft labels, covariance)",
            ),
            "steerability_by_labels": figures.steerability_bars(
                _rows(table, (*BY_LABELS, *CONTROLLED)),
                title="Steerability by labels and learner (attention-guided token)",
            ),
            "steerability_by_class": figures.steerability_by_class(
                _rows(self.study.compare(["concept_class", *KEYS]), by_class),
                title="Steerability by class",
            ),
            "selected_tokens": figures.selected_token_shares(classes),
            "enrichment_by_block": figures.enrichment_by_block(
                self.enrichments,
                title=f"Enrichment by null, mean of {len(self.enrichments['keys'])} concepts",
            ),
        }

    def numbers(self) -> dict[str, Any]:
        """Everything that the pictures show, for a JSON file."""
        steered = _rows(self.study.answers, BY_LABELS[1:2])
        reasons = steered.groupby("coefficient")["reason"].value_counts(normalize=True)
        return {
            "model": self.model,
            "concepts": len(self.selections),
            "prompts": PROMPTS,
            "coefficients": COEFFICIENTS,
            "variants": _records(self.study.compare()),
            "by class": _records(self.study.compare(["concept_class", *KEYS])),
            "reasons by coefficient, soft labels, covariance": {
                f"{coefficient:g}": reasons[coefficient].round(4).to_dict()
                for coefficient in COEFFICIENTS
            },
            "selected tokens": {
                f"{name}/{concept}": selection.offsets.tolist()
                for (name, concept), selection in self.selections.items()
            },
            "enrichment": {
                null: {
                    "alpha": own[0].alpha,
                    "scores by block": [[round(s, 4) for s in one.scores.tolist()] for one in own],
                }
                for null, own in self.enrichments.items()
            },
        }


def run_demo(
    *,
    model: str = EMBEDDED,
    number: int = CONCEPTS,
    work: str | Path = "results/demo",
    processes: int = PROCESSES,
    progress: bool = True,
) -> Demo:
    """The comparison on ``number`` concepts of each class; finished ones are kept in ``work``.

    ``model``: the embedded model, or another that speaks its grammar. Raises ValueError where
    ``number`` is more than a class has.
    """
    chosen = [concept for name in concepts for concept in spread(name, number)]
    logging.disable_progress_bar()
    own = load_model(model)
    folder = Path(work) / _folder(own)
    load = partial(_load, model)
    study = run_on_workers(
        load, chosen, VARIANTS, out=folder, workers=processes, progress=progress, **OPTIONS
    )
    found = _selected(load, chosen, folder / "tokens", model_fingerprint(own), processes)
    few = chosen[:: max(1, number // 2)]
    enrichments: dict[str, list[Enrichment]] = {null: [] for null in NULLS}
    for concept in few:
        paired = build_prompts(own, concept, number=60, layout="paired")
        tokens = _selection(own, paired)
        for null in NULLS:
            enrichments[null].append(enrich(own, paired, tokens, null=null, progress=False))
    candidates = tokens.candidates
    selections = {
        key: TokenSelection(torch.tensor(found[key]) + len(candidates), candidates, tokens.rule)
        for key in ((concept.concept_class or "", concept.name) for concept in chosen)
    }
    return Demo(model_fingerprint(own), study, selections, enrichments)


def save_demo(demo: Demo, out: str | Path) -> list[Path]:
    """Write the pictures and ``demo.json`` into a folder, and return their paths."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in demo.figures().items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    paths.append(folder / "demo.json")
    text = json.dumps(demo.numbers(), indent=1, ensure_ascii=False)
    paths[-1].write_text(text + "\n", encoding="utf-8")
    return paths


def _load(model: str) -> TransformerBridge:
    logging.disable_progress_bar()
    return load_model(model, device="cpu", check=False)


def _selected(
    load: Callable[[], TransformerBridge],
    chosen: Sequence[Concept],
    folder: Path,
    model: str,
    processes: int,
) -> dict[tuple[str, str], list[int]]:
    """The tokens that each concept's study selected, as offsets; finished ones are kept."""
    store = CellStore(folder, {"model": model, "prompts": PROMPTS})
    groups: list[Group] = [{(one.concept_class or "", one.name): one} for one in chosen]
    with closing(Processes(load, _offsets, processes)) as pool:
        run_cells(groups, pool, store, progress=False)
    return {(a, b): store.cells[a, b][0]["offsets"] for group in groups for a, b in group}


def _offsets(model: TransformerBridge, group: Group) -> Results:
    return {
        key: [{"offsets": _selection(model, prompts).offsets.tolist()}]
        for key, concept in group.items()
        for prompts in [build_prompts(model, concept, number=PROMPTS)]
    }


def _selection(model: TransformerBridge, prompts: PromptSet) -> TokenSelection:
    # Prompts without the prefix have no say in the selection.
    return select_tokens(capture(model, prompts.rows(prompts.has_prefix), progress=False))


def _folder(model: TransformerBridge) -> str:
    """A name that another model or other settings do not share."""
    settings = repr((VARIANTS, COEFFICIENTS, PROMPTS)).encode()
    name = model_fingerprint(model).replace(":", "-")
    return f"{name}-{hashlib.sha256(settings).hexdigest()[:8]}"


def _rows(table: pd.DataFrame, variants: Iterable[Variant]) -> pd.DataFrame:
    """The rows of these variants, in their order."""
    place = {tuple(vars(variant).values()): i for i, variant in enumerate(variants)}
    order = [place.get(key, -1) for key in table[KEYS].itertuples(index=False, name=None)]
    rows = table.assign(order=order).query("order >= 0")
    return rows.sort_values("order", kind="stable").drop(columns="order")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    # By way of JSON, so that a missing standard error is null there.
    return json.loads(table.round(4).to_json(orient="records", force_ascii=False))
