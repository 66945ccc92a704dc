"""Which tasks are compared on: profiled ones, others, nearer ones, and unrelated exercises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lenskit.embedded.tasks import UNRELATED
from lenskit.emphasis.ways import Trial
from lenskit.tasks import Task, embedded

FAR = (100, 150)
NEARER = ((0, 0), (10, 40), (40, 100))
PROFILED: Mapping[str, Mapping[str, Any]] = {
    "format": {"asked": True, "length": FAR},
    "pronouns": {"kind": "they", "length": FAR},
    "passage": {"kind": "conflicts", "distractors": 2},
}
"""Tasks on whose train prompts heads, strengths and biases are chosen."""
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "occupation": {"length": FAR},
    "competing_formats": {"emphasise": "earlier"},
    "system_rule": {"kind": "forbidden"},
}
"""Tasks on which nothing is chosen."""
_OF_LENGTH = ("format", "pronouns", "occupation")
_POOL = 96


def training(samples: int, seed: int) -> list[Task]:
    """The profiled tasks' train prompts."""
    return [embedded(name, samples, seed, "train", **given) for name, given in PROFILED.items()]


def unrelated(number: int, seed: int) -> list[Task]:
    """The unrelated exercises' train prompts, so many of each."""
    return [embedded(name, number, seed, "train") for name in UNRELATED if number]


def trials(number: int, nearer: int, exercises: int, seed: int) -> list[Trial]:
    """Held-out prompts: ``number`` for each task, ``nearer`` for each length, ``exercises``."""
    found = []
    for role, several in (("profiled", PROFILED), ("not profiled", OTHERS)):
        for name, given in several.items():
            task = embedded(name, number, seed, **given)
            found.append(Trial(task, role, _solved(name, given, seed)))
    for name in _OF_LENGTH if nearer else ():
        given = {**PROFILED, **OTHERS}[name]
        for length in NEARER:
            task = embedded(name, nearer, seed, **{**given, "length": length})
            task = replace(task, name=f"{name}, {length[0]} to {length[1]}")
            found.append(Trial(task, "distance", _solved(name, given, seed)))
    for name in UNRELATED if exercises else ():
        task = embedded(name, exercises, seed)
        found.append(Trial(task, "unrelated", _solved(name, {}, seed)))
    return found


def _solved(name: str, given: Mapping[str, Any], seed: int) -> tuple:
    """Train prompts to draw examples from: of the task's own kind, short and without filler."""
    short: dict[str, Any] = {"length": (0, 0)} if "length" in given else {}
    short |= {"asked_before": 0.0, "distractors": 1} if name == "passage" else {}
    short |= {"exercises": 1} if name in UNRELATED else {}
    return embedded(name, _POOL, seed, "train", **{**given, **short}).prompts
