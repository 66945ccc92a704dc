"""Steered answers to a task as cells of the engine of the studies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from lenskit._arguments import whole
from lenskit._display import quoted
from lenskit.attention import AttentionEdit, Heads, Policy
from lenskit.generation import SteeringRow, generate_steered
from lenskit.models import SCORES, model_fingerprint, model_report
from lenskit.study import (
    CellsFailed,
    CellStore,
    Key,
    Row,
    identity,
    pool_of,
    run_cells,
)
from lenskit.tasks import Task, emphasised_span

Model: TypeAlias = TransformerBridge | Callable[[], TransformerBridge]
Work: TypeAlias = Callable[[TransformerBridge], Sequence[Row]]
"""What a cell is of: from the model to its rows."""

_ABOUT: Key = ("model",)


@dataclass(frozen=True)
class Cell:
    """What is computed and kept as a whole, and what its rows are ``of``."""

    key: Key
    work: Work
    of: Any


@dataclass(frozen=True)
class Way:
    """Heads that are steered together, and how."""

    heads: Heads
    policy: Policy


@dataclass(frozen=True)
class Setting:
    """What all cells of a folder share, beside the model."""

    protect_bos: bool = False
    template_arguments: Mapping[str, Any] | None = None
    batch_size: int = 256

    def described(self) -> dict[str, Any]:
        """JSON of what decides results."""
        return identity(
            {"protect_bos": self.protect_bos, "template_arguments": self.template_arguments}
        )


@dataclass(frozen=True)
class Shape:
    """The model that the cells are computed with."""

    fingerprint: str
    blocks: int
    heads: int

    @property
    def every(self) -> Heads:
        """All its heads."""
        return Heads((b, h) for b in range(self.blocks) for h in range(self.heads))


def steered_scores(
    task: Task, ways: Sequence[Way | None], setting: Setting, model: TransformerBridge
) -> list[Row]:
    """For each way the scores of the task's cases, and the forward passes that they cost.

    All ways and prompts are rows of the same batches; ``None`` steers nothing.
    """
    if any(way is not None for way in ways):
        model_report(model).require_edit(SCORES)
    arguments = setting.template_arguments
    spans = [emphasised_span(model, p, template_arguments=arguments) for p in task.prompts]

    def row(way: Way | None, place: int) -> SteeringRow:
        edit = None
        if way is not None:
            edit = AttentionEdit(
                spans[place], way.policy, way.heads, protect_bos=setting.protect_bos
            )
        return SteeringRow(task.prompts[place].messages, attention=edit)

    places = range(len(task))
    answers = generate_steered(
        model,
        [row(way, place) for way in ways for place in places],
        max_new_tokens=task.max_new_tokens,
        batch_size=setting.batch_size,
        template_arguments=arguments,
    )
    found: list[Row] = []
    for i in range(len(ways)):
        own = answers[i * len(task) : (i + 1) * len(task)]
        passes = sum(len(answer.token_ids) + answer.finished for answer in own)
        found.append({"scores": task.scores(own).tolist(), "passes": passes})
    return found


def key_of(task: Task, digest: str, label: str, ways: Sequence[Way | None] = ()) -> Key:
    """A key that differs where the task, whose ``described`` is the digest, or a way does."""
    told = [None if w is None else [identity(w.policy), sorted(w.heads)] for w in ways]
    return (task.name, label, _digest([digest, told]))


def sampled(task: Task, samples: int | None, seed: int) -> Task:
    """At most so many of the task's cases, drawn by the seed, in their order."""
    cases = task.cases
    if samples is None or whole("samples", samples, 1) >= len(cases):
        return task
    drawn = np.random.default_rng(seed).choice(len(cases), samples, replace=False)
    places = sorted(place for case in drawn for place in cases[case])
    return replace(task, prompts=tuple(task.prompts[place] for place in places))


def described(task: Task) -> str:
    """A digest of all that decides the scores of a task's answers."""
    prompts = [{f.name: getattr(each, f.name) for f in fields(each)} for each in task.prompts]
    return _digest(identity([task.name, prompts, task.judge, task.max_new_tokens]))


def distinct_tasks(tasks: Task | Sequence[Task]) -> list[Task]:
    """The tasks as a list; raises ValueError for none, or for two of the same name."""
    given = [tasks] if isinstance(tasks, Task) else list(tasks)
    if wrong := [each for each in given if not isinstance(each, Task)]:
        raise TypeError(f"tasks must be Tasks (lk.tasks.embedded, read_task); got {wrong[0]!r}")
    names = [task.name for task in given]
    if not given or len(set(names)) < len(names):
        raise ValueError(
            f"tasks must be at least one, with different names (replace(task, name=…)); got "
            f"{quoted(names)}"
        )
    return given


def computed(
    model: Model,
    cells: Callable[[Shape], Sequence[Cell]],
    setting: Setting,
    *,
    folder: str | Path | None,
    workers: int | None,
    gpus: float | None,
    ray: bool | None,
    progress: bool,
    title: str,
) -> tuple[Shape, list[tuple[Any, Sequence[Row]]]]:
    """What each cell is of with its rows, from ``folder`` where they are there already.

    ``cells`` is told the model's shape, which this process may not have loaded.
    """
    whole("batch_size", setting.batch_size, 1)
    with pool_of(model, _compute, workers, gpus, ray) as pool:
        about = CellStore(None, {})
        try:
            run_cells([{_ABOUT: _about}], pool, about, progress=False)
        except CellsFailed as error:
            raise error.failures[_ABOUT].error from None
        shape = Shape(**about.cells[_ABOUT][0])
        settings = {"what": "steered tasks", "model": shape.fingerprint, **setting.described()}
        store = CellStore(folder, settings)
        wanted = cells(shape)
        groups = [{key: work} for key, work in {c.key: c.work for c in wanted}.items()]
        run_cells(groups, pool, store, score=_mean, title=title, progress=progress)
    return shape, [(cell.of, store.cells[cell.key]) for cell in wanted]


def _compute(model: TransformerBridge, group: Mapping[Key, Work]) -> dict[Key, Sequence[Row]]:
    return {key: work(model) for key, work in group.items()}


def _about(model: TransformerBridge) -> list[Row]:
    return [
        {"fingerprint": model_fingerprint(model)}
        | {"blocks": model.cfg.n_layers, "heads": model.cfg.n_heads}
    ]


def _mean(rows: Sequence[Row]) -> float | None:
    return float(np.mean([row["scores"] for row in rows]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
