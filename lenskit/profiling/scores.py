"""``HeadScores``: what each head is worth on each task, sample by sample."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed, count, quoted
from lenskit.attention import Heads
from lenskit.vectors import checksum, read_safetensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage: TypeAlias = Literal["heads", "blocks", "contribution"]

_FORMAT, _VERSION = "lenskit-head-scores", "1"
# Means of the same scores in another order differ by rounding.
_DECIMALS = 12


@dataclass(frozen=True, repr=False, eq=False)
class HeadScores(Displayed):
    """The scores of every head on every task, as ``profile_heads`` makes them.

    ``samples``: the score of each sample (a case of the task) with that head steered alone; NaN for
    heads that were not profiled, and where a task has fewer samples than another.
    ``baseline_samples``: the same with nothing steered. ``stage``: "heads"; "blocks", where each
    head has the score of its whole block; or "contribution", where scores are logits and the
    baseline is 0. ``policy``: in words. ``model``: fingerprint. ``passes``: what it all cost, in
    forward passes of one row (a generated token is one).

    Raises ValueError for shapes that do not fit, and where no head has scores.
    """

    tasks: tuple[str, ...]
    samples: Float[Tensor, "task sample block head"]
    baseline_samples: Float[Tensor, "task sample"]
    stage: Stage
    policy: str
    model: str
    passes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if (
            self.samples.ndim != 4
            or not self.tasks
            or tuple(self.samples.shape[:2]) != tuple(self.baseline_samples.shape)
            or len(self.tasks) != len(self.samples)
        ):
            raise ValueError(
                "samples must be [task, sample, block, head] and baseline_samples [task, sample] "
                f"of {count(len(self.tasks), 'task')}; got {tuple(self.samples.shape)} and "
                f"{tuple(self.baseline_samples.shape)}"
            )
        if not len(self.heads):
            raise ValueError("samples has no head that every task has scores of")

    @property
    def scores(self) -> Float[Tensor, "task block head"]:
        """The mean over samples; NaN for heads that were not profiled."""
        return self.samples.nanmean(dim=1)

    @property
    def baselines(self) -> Float[Tensor, " task"]:
        """The mean score of each task with nothing steered."""
        return self.baseline_samples.nanmean(dim=1)

    @property
    def gains(self) -> Float[Tensor, "task block head"]:
        """Scores less the baseline of their task."""
        return self.scores - self.baselines[:, None, None]

    @property
    def heads(self) -> Heads:
        """The heads that were profiled."""
        known = self.scores.isfinite().all(dim=0)
        return Heads((b, h) for b, h in known.nonzero().tolist())

    def ranking(self, task: str, *, seed: int = 0) -> list[tuple[int, int]]:
        """The profiled heads, the best first.

        Equal ones stand in a random order, another for each task, which ``seed`` draws: in order of
        their numbers, tasks that tell no heads apart would seem to agree.
        """
        if task not in self.tasks:
            raise ValueError(f"task={task!r} was not profiled; there are {quoted(self.tasks)}")
        pairs = list(self.heads)
        blocks, heads = zip(*pairs, strict=True)
        scores = self.scores[self.tasks.index(task), blocks, heads].numpy().round(_DECIMALS)
        name = zlib.crc32(task.encode("utf-8", "backslashreplace"))
        tie = np.random.default_rng((seed, name)).permutation(len(pairs))
        return [pairs[i] for i in np.lexsort((tie, -scores))]

    def top(self, k: int, *, seed: int = 0) -> dict[str, Heads]:
        """The ``k`` best heads of each task. Raises ValueError for more than were profiled."""
        k = whole("k", k, 1, len(self.heads))
        return {task: Heads(self.ranking(task, seed=seed)[:k]) for task in self.tasks}

    def intersection(self, k: int, *, seed: int = 0) -> Heads:
        """The heads among the ``k`` best of every task, which may be none (see ``overlap``)."""
        return _common(list(self.top(k, seed=seed).values()))

    def union(self, k: int, *, seed: int = 0) -> Heads:
        """The heads among the ``k`` best of any task."""
        sets = self.top(k, seed=seed).values()
        return Heads(frozenset().union(*(each.pairs for each in sets)))

    def leave_one_out(self, k: int, *, seed: int = 0) -> dict[str, Heads]:
        """For each task the heads among the ``k`` best of all *other* tasks, to be tried on it.

        Raises ValueError where there is one task only.
        """
        if len(self.tasks) < 2:
            raise ValueError("with one task there is no other one; profile two at least")
        top = self.top(k, seed=seed)
        return {
            task: _common([top[other] for other in self.tasks if other != task])
            for task in self.tasks
        }

    def table(self) -> pd.DataFrame:
        """A row for each task and profiled head: ``score``, ``gain`` and ``n`` samples."""
        scores, gains = self.scores, self.gains
        number = self.samples.isfinite().sum(dim=1)
        rows = [
            {"task": task, "block": block, "head": head, "score": float(scores[t, block, head])}
            | {"gain": float(gains[t, block, head]), "n": int(number[t, block, head])}
            for t, task in enumerate(self.tasks)
            for block, head in self.heads
        ]
        return pd.DataFrame(rows)

    def figure(
        self,
        *,
        marked: Sequence[Heads] | None = None,
        bound: float | None = None,
        title: str = "",
    ) -> Figure:
        """A heat map for each task, white at its baseline; ``marked`` heads get a dot."""
        from lenskit.figures import head_map

        logits = self.stage == "contribution"
        return head_map(
            self.scores,
            self.tasks,
            None if logits else self.baselines.tolist(),
            label="direct contribution, logits" if logits else "score less that without steering",
            marked=None if marked is None else [each.pairs for each in marked],
            bound=bound,
            title=title,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with everything else as JSON in its metadata."""
        tensors = {
            "samples": self.samples.contiguous(),
            "baseline_samples": self.baseline_samples.contiguous(),
        }
        said: dict[str, Any] = {"tasks": self.tasks, "stage": self.stage, "policy": self.policy}
        said |= {"model": self.model, "passes": self.passes}
        metadata = {"format": _FORMAT, "format_version": _VERSION, "said": json.dumps(said)}
        save_file(tensors, path, metadata=metadata | {"checksum": checksum(tensors, metadata)})

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read a file written by ``save``; raises ValueError where it is none, or is damaged."""
        tensors, metadata = read_safetensors(path)
        if (metadata.get("format"), metadata.get("format_version")) != (_FORMAT, _VERSION):
            raise ValueError(f"{path} holds no scores of heads of version {_VERSION}")
        if metadata.pop("checksum", None) != checksum(tensors, metadata):
            raise ValueError(f"{path} is damaged: it is not what its checksum was made of")
        try:
            said: dict[str, Any] = json.loads(metadata["said"])
            return cls(**said, **dict[str, Any](tensors))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _headline(self) -> str:
        return f"HeadScores of {count(len(self.heads), 'head')} on {count(len(self.tasks), 'task')}"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {"stage": self.stage, "policy": self.policy}
        shown["axes"] = " × ".join(
            f"{name} {size}"
            for name, size in zip(
                ("task", "sample", "block", "head"), self.samples.shape, strict=True
            )
        )
        shown["forward passes"] = f"{self.passes:,}"
        for t, task in enumerate(self.tasks[:8]):
            block, head = self.ranking(task)[0]
            shown[repr(task)] = (
                f"{self.baselines[t]:.3g} without, best {self.scores[t, block, head]:.3g} "
                f"with ({block}, {head})"
            )
        return shown


def _common(sets: Sequence[Heads]) -> Heads:
    return Heads(frozenset.intersection(*(each.pairs for each in sets)))
