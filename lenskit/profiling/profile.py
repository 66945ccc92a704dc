"""Every head steered alone on every task, or a cheaper first look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformer_lens.model_bridge import TransformerBridge

from lenskit.attention import Heads, Pasta, Policy
from lenskit.profiling.cells import (
    Cell,
    Model,
    Setting,
    Shape,
    Way,
    Work,
    computed,
    described,
    distinct_tasks,
    key_of,
    sampled,
    steered_scores,
)
from lenskit.profiling.contribution import contributions
from lenskit.profiling.scores import HeadScores, Stage
from lenskit.study import Row
from lenskit.tasks import Task

_PASTA = Pasta(alpha=0.01)


def profile_heads(
    model: Model,
    tasks: Task | Sequence[Task],
    policy: Policy = _PASTA,
    *,
    heads: Heads | None = None,
    stage: Stage = "heads",
    samples: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    ray: bool | None = None,
    protect_bos: bool = False,
    before: str = "",
    batch_size: int = 256,
    template_arguments: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every head on every task by steering it alone, and the task with nothing steered.

    As PASTA profiles (arXiv 2311.02262, α = 0.01), the spans being those that the tasks emphasise.
    The heads of a block and the samples are rows of the same generation. ``stage`` gives scores of
    the same shape for less: "blocks" steers all heads of a block together; "contribution" is one
    forward pass for each prompt (see ``lk.profiling.contributions``, which ``before`` is for) and
    has no policy. ``lk.profiling.agreement`` compares them.

    ``heads``: which ones, by default all. ``samples``: at most so many cases of each task, drawn by
    ``seed``. Profile on prompts of the train split and judge on others.

    With ``folder`` each block of each task is kept there when it is done, and a call that was
    killed at any point goes on from there to the same scores; more tasks may follow later. With
    ``workers`` (``gpus``, ``ray``: as in ``run_on_workers``) give a function that loads the model
    in place of the model, and call it under ``if __name__ == "__main__":`` in a script.

    Raises ModelCheckError for a model whose attention cannot be edited, or for "contribution" read;
    ValueError for tasks of the same name, heads that the model has not, and a folder of another
    model or other settings; CellsFailed where single cells failed: the others are kept.

    >>> from dataclasses import replace
    >>> task = replace(lk.tasks.embedded("count", 2), max_new_tokens=4)
    >>> some = lk.Heads({0: [0, 1], 2: [3]})
    >>> scores = lk.profile_heads(model, task, lk.Pasta(alpha=0.01), heads=some, progress=False)
    >>> len(scores.table()), len(scores.top(2)["count"])
    (3, 2)
    """
    if stage not in get_args(Stage):
        raise ValueError(f"stage must be one of {', '.join(get_args(Stage))}; got {stage!r}")
    if heads is not None and not len(heads):
        raise ValueError("heads is empty, so nothing would be profiled")
    chosen = [sampled(task, samples, seed) for task in distinct_tasks(tasks)]
    setting = Setting(protect_bos, template_arguments, batch_size)
    shape, cells = computed(
        model,
        partial(_planned, chosen, policy, heads, stage, before, setting),
        setting,
        folder=folder,
        workers=workers,
        gpus=gpus,
        ray=ray,
        progress=progress,
        title="profiling",
    )
    most = max(len(task.cases) for task in chosen)
    found = torch.full(
        (len(chosen), most, shape.blocks, shape.heads), torch.nan, dtype=torch.float64
    )
    baseline = torch.full(found.shape[:2], torch.nan, dtype=torch.float64)
    passes = 0
    for (place, sets), rows in cells:
        for row, pairs in zip(rows, sets, strict=True):
            passes += row["passes"]
            scores = torch.tensor(row["scores"], dtype=torch.float64)
            if pairs is None:
                baseline[place, : len(scores)] = scores
            for block, head in pairs or ():  # a Heads without any is of one that was not asked for
                found[place, : len(scores), block, head] = scores
    if stage == "contribution":
        for place, task in enumerate(chosen):
            baseline[place, : len(task.cases)] = 0.0
    said = "direct contribution" if stage == "contribution" else repr(policy)
    names = tuple(task.name for task in chosen)
    return HeadScores(names, found, baseline, stage, said, shape.fingerprint, passes)


def _planned(
    tasks: Sequence[Task],
    policy: Policy,
    heads: Heads | None,
    stage: Stage,
    before: str,
    setting: Setting,
    shape: Shape,
) -> list[Cell]:
    """The cells, each of its task's place and of the heads of each of its rows (None: baseline)."""
    asked = shape.every if heads is None else heads
    if unknown := asked - shape.every:
        raise ValueError(
            f"heads {sorted(unknown)[:5]} are not in this model, which has {shape.blocks} blocks "
            f"of {shape.heads} heads"
        )
    cells: list[Cell] = []
    for place, task in enumerate(tasks):
        digest = described(task)
        if stage == "contribution":
            work: Work = partial(_contribution_rows, task, before, setting)
            single = [Heads([pair]) & asked for pair in shape.every]
            key = key_of(task, digest, f"contribution, answers after {before!r}")
            cells.append(Cell(key, work, (place, single)))
            continue
        rows: dict[str, list[Heads | None]] = {"nothing steered": [None]}
        for block, own in asked.by_block().items():
            if stage == "heads":
                rows[f"block {block}, each head"] = [Heads({block: [head]}) for head in own]
            else:
                rows[f"block {block}, together"] = [Heads({block: own})]
        for label, sets in rows.items():
            ways = tuple(None if each is None else Way(each, policy) for each in sets)
            work = partial(steered_scores, task, ways, setting)
            cells.append(Cell(key_of(task, digest, label, ways), work, (place, sets)))
    return cells


def _contribution_rows(
    task: Task, before: str, setting: Setting, model: TransformerBridge
) -> list[Row]:
    """A row for each head of the model, blocks in order; the passes stand in the first."""
    found = contributions(
        model,
        task.prompts,
        before=before,
        batch_size=min(setting.batch_size, 64),
        template_arguments=setting.template_arguments,
    ).double()
    cases = torch.stack([found[places].mean(dim=0) for places in task.cases]).flatten(1)
    return [
        {"scores": own.tolist(), "passes": 0 if i else len(task)} for i, own in enumerate(cases.T)
    ]
