"""Heads and strengths, chosen on the train prompts of the profiled tasks alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lenskit.attention import (
    HeadBias,
    Heads,
    InstABoost,
    KeyProjections,
    Pasta,
    Seka,
    Spotlight,
    fit_key_projections,
    key_contrast,
)
from lenskit.emphasis.keeping import Keeping
from lenskit.emphasis.learnt import learn_head_bias
from lenskit.emphasis.ways import Trial, Way, answered
from lenskit.profiling import HeadScores, profile_heads
from lenskit.study import Row
from lenskit.tasks import Task, embedded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ALPHAS = (0.3, 0.1, 0.01, 0.001)
MULTIPLIERS = (2.0, 4.0, 8.0, 19.0)
TARGETS = (0.1, 0.2, 0.35, 0.5)
GAINS = (0.5, 1.0, 2.0, 4.0)
SHARES = (0.25, 0.5, 1.0, 1.5)
OWN = "learnt bias"
SPARING = ", sparing others"
MOST_LOST = 0.02
"""By how much a way that spares other tasks may do worse on them than nothing does."""


@dataclass(frozen=True)
class Strengths:
    """What is tried of each published policy: of PASTA, InstABoost, Spotlight and SEKA."""

    alphas: tuple[float, ...] = ALPHAS
    multipliers: tuple[float, ...] = MULTIPLIERS
    targets: tuple[float, ...] = TARGETS
    gains: tuple[float, ...] = GAINS


GENTLE = Strengths((0.5, 0.3, 0.2), (1.5, 2.0, 3.0, 4.0), (0.05, 0.1, 0.2), (0.25, 0.5, 1.0))
"""What is tried where other tasks must not suffer."""


def mean_ranking(scores: HeadScores) -> list[tuple[int, int]]:
    """The profiled heads by their mean gain over the tasks, the best first.

    Equal ones stand as the first task ranks them.
    """
    gains = scores.gains.mean(dim=0)
    order = scores.ranking(scores.tasks[0])
    return sorted(order, key=lambda pair: -round(float(gains[pair]), 12))


def profiled(
    model: TransformerBridge,
    tasks: Sequence[Task],
    keep: Keeping,
    *,
    protect_bos: bool = False,
    batch_size: int = 256,
) -> list[tuple[int, int]]:
    """The heads of the model, those first that help most on these tasks when steered alone."""

    def make() -> list[Row]:
        scores = profile_heads(
            model, tasks, protect_bos=protect_bos, batch_size=batch_size, progress=False
        )
        gains = scores.gains.mean(dim=0)
        return [
            {"block": block, "head": head, "gain": float(gains[block, head])}
            | {task: float(scores.gains[t, block, head]) for t, task in enumerate(scores.tasks)}
            for block, head in mean_ranking(scores)
        ]

    return [(row["block"], row["head"]) for row in keep.rows("profiled heads", make=make)]


def chosen(
    model: TransformerBridge,
    families: Mapping[str, Sequence[Way]],
    tasks: Sequence[Task],
    keep: Keeping,
    *,
    others: Sequence[Task] = (),
    batch_size: int = 256,
) -> dict[str, Way]:
    """Of each family the way with the best mean score on these tasks, the first of equals.

    With ``others`` only ways count that lose at most ``MOST_LOST`` on these tasks to nothing done
    (where every way loses more, the one that loses least), and names end with ``SPARING``.
    """
    wanted, spared = ([Trial(task, "train") for task in each] for each in (tasks, others))

    def mean(way: Way, trials: Sequence[Trial]) -> float:
        own = answered(model, way, trials, batch_size=batch_size)
        return sum(row["score"] for row in own) / len(own)

    least = -math.inf
    if others:
        (plain,) = keep.rows(
            "nothing on others", make=lambda: [{"score": mean(Way("nothing"), spared)}]
        )
        least = plain["score"] - MOST_LOST - 1e-9
    found = {}
    for family, ways in families.items():

        def tried(ways: Sequence[Way] = ways) -> list[Row]:
            return [
                {"place": place, "tried": way.name, "score": mean(way, wanted)}
                | ({"on others": mean(way, spared)} if others else {})
                for place, way in enumerate(ways)
            ]

        name = family + SPARING * bool(others)
        rows = keep.rows("chosen", name, make=tried)
        fit = [row for row in rows if row.get("on others", 0.0) >= least]
        best = (
            max(fit, key=lambda row: row["score"])
            if fit
            else max(rows, key=lambda row: row["on others"])
        )
        found[name] = replace(ways[best["place"]], name=name)
    return found


def families(
    order: Sequence[tuple[int, int]],
    ks: Sequence[int],
    projections: KeyProjections,
    every: Heads,
    strengths: Strengths = Strengths(),
) -> dict[str, list[Way]]:
    """The published policies, each with the strengths (and numbers of heads) that are tried."""

    def pasta(heads: Mapping[str, Heads], **options: Any) -> list[Way]:
        return [
            Way(f"{name}, α = {alpha:g}", Pasta(alpha), own, **options)
            for name, own in heads.items()
            for alpha in strengths.alphas
        ]

    top = {f"{k} heads": Heads(order[:k]) for k in ks}
    groups = projections.shift.numel()
    return {
        "PASTA, profiled heads": pasta(top),
        "PASTA, profiled heads, first token protected": pasta(top, protect_bos=True),
        "PASTA, all heads": pasta({"all": every}),
        "InstABoost": _boosts(strengths.multipliers),
        "Spotlight, as published": [
            Way(f"ψ* = {t:g}", Spotlight(t, published=True)) for t in strengths.targets
        ],
        "Spotlight, exact": [Way(f"ψ* = {t:g}", Spotlight(t)) for t in strengths.targets],
        "SEKA": [
            Way(f"{k} groups of heads, gain {g:g}", Seka(projections, g), projections.heads(k))
            for k in (max(1, groups // 4), groups // 2)
            for g in strengths.gains
        ],
    }


def _boosts(multipliers: Sequence[float] = MULTIPLIERS) -> list[Way]:
    return [Way(f"M = {m:g}", InstABoost(m)) for m in multipliers]


def projections_of(
    model: TransformerBridge, number: int, seed: int, batch_size: int = 32
) -> KeyProjections:
    """SEKA's projections, learnt on passages of the train split with and without their question."""
    prompts = embedded(
        *("passage", number, seed, "train"), kind="unseen", distractors=1, asked_before=0.0
    ).prompts
    parts = [prompt.messages[0]["content"].split("\n") for prompt in prompts]
    others = [question for _, question in parts[1:] + parts[:1]]
    examples = [
        key_contrast(model, text, prompt.emphasised, question, other)
        for prompt, (text, question), other in zip(prompts, parts, others, strict=True)
    ]
    return fit_key_projections(model, examples, batch_size=batch_size, progress=False)


def learnt_way(
    model: TransformerBridge,
    tasks: Sequence[Task],
    keep: Keeping,
    *,
    steps: int,
    seed: int,
    others: Sequence[Task] = (),
    batch_size: int = 256,
) -> Way:
    """A bias for every head, which begins as the InstABoost that does best on these tasks.

    It is learnt on two thirds of each task's prompts, and how much of it is used is chosen on the
    others. With ``others`` it is learnt on these tasks too, and spares them.
    """
    name = "InstABoost"
    rival = chosen(model, {name: _boosts()}, tasks, keep, batch_size=batch_size)[name].policy
    assert isinstance(rival, InstABoost)
    start = math.log(rival.multiplier)
    learnt_on = [_part(task, kept_back=False) for task in (*tasks, *others)]
    kept_back, spared = ([_part(task, kept_back=True) for task in own] for own in (tasks, others))
    own = OWN + SPARING * bool(others)

    def make() -> list[Row]:
        found = learn_head_bias(model, learnt_on, start=start, steps=steps, seed=seed)
        assert found.outside is not None
        return [{"inside": found.inside.tolist(), "outside": found.outside.tolist()}]

    (row,) = keep.rows(own, make=make)
    bias = HeadBias(torch.tensor(row["inside"]), torch.tensor(row["outside"]))
    ways = [Way(f"{share:g} of what is learnt", _between(start, bias, share)) for share in SHARES]
    options: dict[str, Any] = {"others": spared, "batch_size": batch_size}
    return chosen(model, {OWN: ways}, kept_back, keep, **options)[own]


def _part(task: Task, *, kept_back: bool) -> Task:
    """Every third prompt, or the others; all of a task that has too few for that."""
    own = tuple(each for i, each in enumerate(task.prompts) if (i % 3 == 2) is kept_back)
    return replace(task, prompts=own) if len(task) > 2 else task


def _between(start: float, bias: HeadBias, share: float) -> HeadBias:
    """From ``start`` for all heads, at a share of 0, to what was learnt, and beyond."""
    inside = start + share * (bias.inside - start)
    return HeadBias(inside, None if bias.outside is None else share * bias.outside)
