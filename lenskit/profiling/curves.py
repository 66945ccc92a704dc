"""How a task's score goes with the number of steered heads and with the strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lenskit._arguments import whole
from lenskit.attention import Heads, Pasta, Policy
from lenskit.profiling.cells import (
    Cell,
    Model,
    Setting,
    Shape,
    Way,
    computed,
    described,
    key_of,
    sampled,
    steered_scores,
)
from lenskit.profiling.comparison import random_like
from lenskit.scoring import mean_interval
from lenskit.tasks import Task

ALPHAS = (0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0)
"""From the degenerate 0 through published 0.01 and 1, which changes nothing, to steering away."""

# What stands for 0: a query without any key in the span then keeps its pattern, where α = 0 would
# leave it no key at all.
_LIMIT = 1e-30


def curve(
    model: Model,
    task: Task,
    heads: Heads | Iterable[Heads],
    alphas: Sequence[float] = ALPHAS,
    *,
    policy: Callable[[float], Policy] = Pasta,
    random: int = 3,
    among: Heads | None = None,
    samples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
    draws: int = 10_000,
    folder: str | Path | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    ray: bool | None = None,
    protect_bos: bool = False,
    batch_size: int = 256,
    template_arguments: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Scores of a task over sets of heads (such as several top k) and strengths, tidy.

    A row for each set of ``k`` heads and each ``alpha``, given to ``policy`` (0: its limit from
    above), named "given" in the column ``heads``; and for each of them ``random`` sets drawn from
    ``among`` (by default all heads): "random" ones, and "random by block" with as many in each
    block as the given set; ``draw`` numbers them. The first row, "none", is nothing steered.
    ``score`` is the mean over the ``n`` cases with its interval ``low`` to ``high`` at ``level``,
    ``difference`` what it gains over nothing steered on the same cases, with ``difference_low``
    and ``difference_high`` (percentiles of ``draws`` bootstrap samples).

    The task should be of prompts that the heads were not chosen by. The other arguments are those
    of ``profile_heads``, which may share the ``folder``; and so are the errors.

    >>> from dataclasses import replace
    >>> task = replace(lk.tasks.embedded("count", 2), max_new_tokens=2)
    >>> sets = [lk.Heads({0: [0]}), lk.Heads({0: [0, 1]})]
    >>> table = lk.profiling.curve(model, task, sets, (0.01, 1), random=0, progress=False)
    >>> table[["heads", "k", "alpha"]].values.tolist()[:3]
    [['none', 0, 1.0], ['given', 1, 0.01], ['given', 1, 1.0]]
    """
    sets = [heads] if isinstance(heads, Heads) else list(heads)
    random, alphas = whole("random", random, 0), [float(alpha) for alpha in alphas]
    if not sets or not all(isinstance(each, Heads) and len(each) for each in sets):
        raise ValueError("heads must be a Heads, or several, none of them empty")
    if not alphas:
        raise ValueError(f"alphas is empty; give one at least, such as {ALPHAS}")
    strengths = {alpha: policy(alpha or _LIMIT) for alpha in alphas}
    chosen, setting = (
        sampled(task, samples, seed),
        Setting(protect_bos, template_arguments, batch_size),
    )

    def cells(shape: Shape) -> list[Cell]:
        pool, digest = among or shape.every, described(chosen)

        def cell(said: Sequence[dict[str, Any]], ways: Sequence[Way | None], label: str) -> Cell:
            work = partial(steered_scores, chosen, tuple(ways), setting)
            return Cell(key_of(chosen, digest, label, ways), work, said)

        none: dict[str, Any] = {"heads": "none", "k": 0, "alpha": 1.0, "draw": 0}
        found = [cell([none], [None], "nothing steered")]
        for own in sets:
            drawn = [("given", 0, own)]
            for name, by_block in (("random", False), ("random by block", True)):
                if random:
                    like = random_like(own, pool, number=random, by_block=by_block, seed=seed)
                    drawn += [(name, draw, each) for draw, each in enumerate(like)]
            for alpha, strength in strengths.items():
                said = [
                    {"heads": name, "k": len(own), "alpha": alpha, "draw": draw}
                    for name, draw, _ in drawn
                ]
                ways = [Way(each, strength) for _, _, each in drawn]
                found.append(cell(said, ways, f"{len(own)} heads together"))
        return found

    _, found = computed(
        model,
        cells,
        setting,
        folder=folder,
        workers=workers,
        gpus=gpus,
        ray=ray,
        progress=progress,
        title="curve",
    )
    plain = np.array(found[0][1][0]["scores"])
    interval = partial(mean_interval, level=level, draws=draws, seed=seed)
    table = []
    for said, row in (
        (said, row) for of, rows in found for said, row in zip(of, rows, strict=True)
    ):
        scores = np.array(row["scores"])
        (low, high), (gain_low, gain_high) = interval(scores), interval(scores - plain)
        table.append(
            said
            | {"score": scores.mean(), "low": low, "high": high, "n": len(scores)}
            | {"difference": (scores - plain).mean()}
            | {"difference_low": gain_low, "difference_high": gain_high}
        )
    return pd.DataFrame(table)
