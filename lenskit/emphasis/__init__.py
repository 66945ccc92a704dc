"""Emphasis compared: attention steering against prompts, and against the rest of the field.

``learn_head_bias`` finds a bias for every head on the prompts that others choose heads by. The
experiments are functions of a model and ``Sizes`` that give tables as ``lk.experiments`` do:
``compare`` (all ways to emphasise a span), ``field`` (attention, activations, soft prompts and
weights), ``sources`` (where a steering vector comes from), ``heads`` (what a profile is worth) and
``composition`` (what edits lose beside one another)::

    found = lk.emphasis.compare(model, out="results/emphasis")
    found.save("results/emphasis")

The adaptations that ``field`` compares with are functions of their own: ``fine_tune``,
``low_rank``, ``rank_one``, ``soft_prompt`` and ``steering_vectors`` give an ``Adaptation``, whose
``inside(model)`` is a context; afterwards the weights are bit for bit what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lenskit.emphasis.adaptations import (
    Adaptation,
    changed_weights,
    fine_tune,
    low_rank,
    rank_one,
    soft_prompt,
    steering_vectors,
)
from lenskit.emphasis.comparison import Sizes, compare
from lenskit.emphasis.composition import composition
from lenskit.emphasis.distractors import distractor_span
from lenskit.emphasis.field import field
from lenskit.emphasis.heads import heads
from lenskit.emphasis.learnt import learn_head_bias
from lenskit.emphasis.soft import SoftPrompt
from lenskit.emphasis.sources import sources
from lenskit.study import experiments

EXPERIMENTS: Mapping[str, Callable[..., experiments.Experiment]] = MappingProxyType(
    {
        "policies": compare,
        "field": field,
        "sources": sources,
        "heads": heads,
        "composition": composition,
    }
)
"""Every experiment on emphasis, by the name that ``lenskit emphasis`` knows it by."""

__all__ = [
    "EXPERIMENTS",
    "Adaptation",
    "Sizes",
    "SoftPrompt",
    "changed_weights",
    "distractor_span",
    "compare",
    "composition",
    "field",
    "fine_tune",
    "heads",
    "learn_head_bias",
    "low_rank",
    "rank_one",
    "soft_prompt",
    "sources",
    "steering_vectors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
