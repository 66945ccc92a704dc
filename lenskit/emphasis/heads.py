"""Which heads, and is the choice worth anything? The tables of a profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit.attention import Heads
from lenskit.emphasis.choosing import mean_ranking
from lenskit.emphasis.comparison import Sizes
from lenskit.emphasis.tables import DRAWS
from lenskit.emphasis.trials import PROFILED, training
from lenskit.models import model_fingerprint
from lenskit.profiling import agreement, curve, overlap, profile_heads, reliability
from lenskit.study import experiments
from lenskit.tasks import embedded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ALPHAS = (0.0, 0.001, 0.5, 2.0, 5.0)
# As published, and what does best here: at these the profile is compared with random sets.
COMPARED = (0.01, 0.1)
_ENDS = ("difference_low", "difference_high")


def heads(
    model: TransformerBridge,
    sizes: Sizes | None = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    command: str = "",
) -> experiments.Experiment:
    """Every head steered alone by PASTA on train prompts of three tasks, and what that is worth.

    Measures are of curves on held-out prompts: the score with so many of the best heads (by mean
    gain) at each α, beside random sets of equal size, and of equal numbers in each block. Parts:
    the matrix of scores, split-half reliability, overlap of the tasks' best heads against chance,
    and two cheaper first stages (whole blocks; one forward pass) with cost and agreement.

    With ``out`` parts are kept as in ``compare``.
    """
    sizes = Sizes() if sizes is None else sizes
    tasks = training(sizes.samples, sizes.seed)
    # The folder of cells is one of profiles, which know their own settings.
    folder = None if out is None else Path(out) / "cells" / f"heads-{_digest(sizes)}"
    options: dict[str, Any] = {"folder": folder, "progress": progress, "batch_size": batch_size}
    profile = partial(profile_heads, model, tasks, **options)
    scores = profile()
    cheaper = {stage: profile(stage=stage) for stage in ("blocks", "contribution")}
    k = max(1, len(scores.heads) // 8)
    best = mean_ranking(scores)
    ks = [each for each in sizes.ks if each <= len(best)] or [1]
    sets = [Heads(best[:each]) for each in ks]
    curves = []
    for name, given in PROFILED.items():
        task = embedded(name, sizes.number, sizes.seed, **given)
        curved = partial(curve, model, task, sets, seed=sizes.seed, draws=DRAWS, **options)
        others = curved(alphas=ALPHAS, random=0)
        found = [curved(alphas=COMPARED, random=sizes.draws), others[others["heads"] != "none"]]
        curves += [each.assign(task=name) for each in found]
    drawn = pd.concat(curves, ignore_index=True).rename(columns={"score": "mean"})
    said = [f"{kind}, k = {k}, α = {a:g}" for kind, k, a in drawn[["heads", "k", "alpha"]].values]
    table = drawn.assign(way=said, measure="score", reference="none, k = 0, α = 1")
    every = _over_tasks(table).assign(task="all", n=sizes.number * len(PROFILED))
    table = pd.concat([every, table], ignore_index=True)
    return experiments.Experiment(
        "heads",
        "Which heads are worth steering, and is the choice reliable?",
        command or "lk.emphasis.heads(model)",
        table,
        "none, k = 0, α = 1",
        "way",
        {
            "scores": scores.table(),
            "reliability": reliability(scores, seed=sizes.seed),
            "overlap": overlap(scores, seed=sizes.seed),
            "cheaper stages": pd.concat(
                [agreement(scores, each, k).assign(stage=stage) for stage, each in cheaper.items()],
                ignore_index=True,
            ),
        },
        notes=(
            f"{model_fingerprint(model)}; {sizes.samples} train prompts of each task for the "
            f"scores, {sizes.number} held-out prompts of each for the curves.",
            "Rows of all tasks are means over tasks and draws, with the tasks' intervals combined "
            "as those of independent means.",
        ),
        group="task",
        counted="n",
    )


def _over_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks and draws; half an interval is the root of the tasks' squared halves."""
    by = ["way", "measure", "reference", "heads", "k", "alpha"]
    found = []
    for mean, names in (("mean", ("low", "high")), ("difference", _ENDS)):
        ends = list(names)
        of_task = table.groupby([*by, "task"], sort=False)[[mean, *ends]].mean()
        halves = of_task[ends].sub(of_task[mean], axis=0).pow(2)
        whole = of_task[[mean]].groupby(by, sort=False).mean()
        number = of_task.groupby(by, sort=False)[mean].size()
        for end, sign in zip(ends, (-1, 1), strict=True):
            half = halves[end].groupby(by, sort=False).sum().pow(0.5) / number
            whole[end] = whole[mean] + sign * half
        found.append(whole)
    return pd.concat(found, axis=1).reset_index()


def _digest(sizes: Sizes) -> str:
    from hashlib import sha256

    return sha256(repr(asdict(sizes)).encode()).hexdigest()[:8]
