"""Experiments: one question about steering each, answered on many concepts with its controls.

Each is a function of a model and concepts that gives an ``Experiment``: a tidy table with intervals
and paired differences, which prints and is saved with the command that made it. All run through the
engine of the studies, on any model with any judge::

    found = lk.experiments.tokens(model, concepts, judge=judge, out="results/tokens")
    found.save("results/tokens")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lenskit.study.experiments.beyond_text import beyond_text
from lenskit.study.experiments.blocks import blocks
from lenskit.study.experiments.classes import classes
from lenskit.study.experiments.cost import cost
from lenskit.study.experiments.failures import failures
from lenskit.study.experiments.labels import labels
from lenskit.study.experiments.learners import learners
from lenskit.study.experiments.loop import loop
from lenskit.study.experiments.motif_bench import motif_model
from lenskit.study.experiments.motifs import Motifs, train_motifs
from lenskit.study.experiments.open_prefix import open_prefix
from lenskit.study.experiments.proxy import proxy
from lenskit.study.experiments.recipe import recipe
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.sizes import model_folders, sizes, trained_on
from lenskit.study.experiments.tokens import tokens
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.experiments.where import where

EXPERIMENTS: Mapping[str, Callable[..., Experiment]] = MappingProxyType(
    {
        "tokens": tokens,
        "labels": labels,
        "blocks": blocks,
        "proxy": proxy,
        "where": where,
        "learners": learners,
        "classes": classes,
        "cost": cost,
        "failures": failures,
        "open-prefix": open_prefix,
        "recipe": recipe,
        "loop": loop,
    }
)
"""Every experiment on one model, by the name that ``lenskit experiment`` knows it by.

Two more bring models of their own: ``sizes``, several of them, and ``beyond_text``.
"""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Fitted",
    "Motifs",
    "Setting",
    "Way",
    "beyond_text",
    "blocks",
    "classes",
    "controls",
    "cost",
    "failures",
    "labels",
    "learners",
    "loop",
    "model_folders",
    "motif_model",
    "open_prefix",
    "proxy",
    "recipe",
    "sizes",
    "tokens",
    "train_motifs",
    "trained_on",
    "where",
]


def __dir__() -> list[str]:
    return __all__
