"""What scores of heads are worth: reliability, overlap against chance, agreement, random sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import spearmanr

from lenskit._arguments import whole
from lenskit.attention import Heads
from lenskit.profiling.scores import HeadScores

# Where means differ by rounding alone, ranks must not.
_DECIMALS = 12


def reliability(
    scores: HeadScores, *, halves: int = 200, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Split-half reliability: do two halves of the samples rank the heads alike?

    A row for each task: ``correlation``, the mean over ``halves`` random splits of the rank
    correlation (Spearman) between the mean scores of the heads on the two halves, with the
    percentiles ``low`` and ``high`` over the splits, and ``full``, 2r/(1+r) of it (Spearman and
    Brown), expected of all ``n`` samples. NaN where a half ranks nothing. Raises ValueError for
    fewer than two samples.

    >>> import torch
    >>> samples = torch.arange(8.0).reshape(1, 4, 1, 2)
    >>> scores = lk.HeadScores(("a",), samples, torch.zeros(1, 4), "heads", "", "", 0)
    >>> float(lk.profiling.reliability(scores)["correlation"][0].round(3))
    1.0
    """
    halves, level = whole("halves", halves, 1), _level(level)
    rows = []
    for task in scores.tasks:
        own = _samples(scores, task)
        if len(own) < 2:
            raise ValueError(f"task {task!r} has {len(own)} sample; a split needs two at least")
        random, half = np.random.default_rng(seed), len(own) // 2
        found = []
        for _ in range(halves):
            order = random.permutation(len(own))
            one, other = own[order[:half]], own[order[half : 2 * half]]
            found.append(_spearman(one.mean(axis=0), other.mean(axis=0)))
        mean = float(np.mean(found))
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
        full = 2 * mean / (1 + mean) if mean > -1 else float("nan")
        rows.append(
            {"task": task, "correlation": mean, "low": float(low), "high": float(high)}
            | {"full": full, "n": len(own)}
        )
    return pd.DataFrame(rows)


def overlap(
    scores: HeadScores,
    ks: Sequence[int] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """How many heads the top k of all tasks share, beside what independent rankings would.

    A row for each ``k``: the number ``shared``, the ``expected`` N (k/N)^T for N heads and T tasks,
    the percentiles ``low`` and ``high`` over ``draws`` independent random rankings, and ``p``, the
    share of draws (the observed one among them) with as many. ``ks``: by default some from 5 to
    half of the heads. Raises ValueError for one task, and for k out of range.

    >>> import torch
    >>> samples = torch.arange(8.0).expand(2, 1, 1, 8)
    >>> scores = lk.HeadScores(("a", "b"), samples, torch.zeros(2, 1), "heads", "", "", 0)
    >>> lk.profiling.overlap(scores, [4])[["shared", "expected"]].values.tolist()
    [[4.0, 2.0]]
    """
    draws, level = whole("draws", draws, 1), _level(level)
    number, tasks = len(scores.heads), len(scores.tasks)
    if tasks < 2:
        raise ValueError("overlap needs two tasks at least")
    if ks is None:
        ks = [k for k in (5, 10, 20, 50, 100, 200, 500) if k <= number // 2] or [1]
    ks = [whole("k", k, 1, number) for k in ks]
    random = np.random.default_rng(seed)
    # The worst rank of each head over the tasks: below k, it is in every top k.
    worst = np.zeros((draws, number), dtype=np.int64)
    for _ in range(tasks):
        worst = np.maximum(worst, random.permuted(np.tile(np.arange(number), (draws, 1)), axis=1))
    rows = []
    for k in ks:
        shared, drawn = len(scores.intersection(k)), (worst < k).sum(axis=1)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        p = (1 + int((drawn >= shared).sum())) / (1 + draws)
        rows.append(
            {"k": k, "shared": shared, "expected": number * (k / number) ** tasks}
            | {"low": float(low), "high": float(high), "p": p}
        )
    return pd.DataFrame(rows)


def agreement(one: HeadScores, other: HeadScores, k: int = 10) -> pd.DataFrame:
    """How far two ways of scoring agree on the heads, and what each costs.

    A row for each task that both have, over the heads that both scored: the rank correlation
    ``spearman``, the share ``shared`` of the first's ``k`` best heads that are among the second's,
    the same expected by ``chance``, and the forward passes of all tasks, ``passes`` and
    ``other_passes``. Raises ValueError for scores of different models or without a common task.

    >>> from dataclasses import replace
    >>> task = replace(lk.tasks.embedded("count", 2), max_new_tokens=2)
    >>> options = {"heads": lk.Heads({0: [0, 1], 1: [0]}), "progress": False}
    >>> exact = lk.profile_heads(model, task, **options)
    >>> fast = lk.profile_heads(model, task, stage="contribution", **options)
    >>> found = lk.profiling.agreement(exact, fast, k=2)
    >>> found[["passes", "other_passes"]].values.tolist()
    [[16, 2]]
    """
    if one.model != other.model:
        raise ValueError(f"the scores are of different models: {one.model} and {other.model}")
    tasks = [task for task in one.tasks if task in other.tasks]
    pairs = list(one.heads & other.heads)
    if not tasks or not pairs:
        raise ValueError("the scores have no task, or no head, in common")
    k = whole("k", k, 1, len(pairs))
    blocks, heads = zip(*pairs, strict=True)
    rows = []
    for task in tasks:
        values = [
            each.scores[each.tasks.index(task), blocks, heads].numpy() for each in (one, other)
        ]
        best = [
            {*[pair for pair in each.ranking(task) if pair in set(pairs)][:k]}
            for each in (one, other)
        ]
        rows.append(
            {"task": task, "spearman": _spearman(*values), "k": k}
            | {"shared": len(best[0] & best[1]) / k, "chance": k / len(pairs)}
            | {"passes": one.passes, "other_passes": other.passes}
        )
    return pd.DataFrame(rows)


def random_like(
    heads: Heads, among: Heads, *, number: int = 1, by_block: bool = False, seed: int = 0
) -> list[Heads]:
    """Random sets of as many heads from ``among``, or ``by_block`` of as many in each block.

    What profiled heads must beat. Raises ValueError where ``among`` has too few.

    >>> own = lk.Heads({0: [1], 2: [0, 3]})
    >>> drawn = lk.profiling.random_like(own, lk.Heads.all(model), by_block=True)[0]
    >>> {block: len(heads) for block, heads in drawn.by_block().items()}
    {0: 1, 2: 2}
    """
    number = whole("number", number, 1)
    parts = [(len(heads), sorted(among))]
    if by_block:
        there = among.by_block()
        parts = [
            (len(own), [(block, head) for head in there.get(block, ())])
            for block, own in heads.by_block().items()
        ]
    for size, pool in parts:
        if size > len(pool):
            raise ValueError(f"among has {len(pool)} heads to draw {size} from")
    random = np.random.default_rng(seed)
    return [
        Heads(
            pool[i] for size, pool in parts for i in random.choice(len(pool), size, replace=False)
        )
        for _ in range(number)
    ]


def _samples(scores: HeadScores, task: str) -> Float[np.ndarray, "sample head"]:
    pairs = list(scores.heads)
    blocks, heads = zip(*pairs, strict=True)
    own = scores.samples[scores.tasks.index(task)][:, blocks, heads].numpy()
    return own[np.isfinite(own).all(axis=1)]


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.round(_DECIMALS), other.round(_DECIMALS)
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    return level
