"""An edit of attention: a policy on the keys of spans, for chosen heads and queries of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.attention.heads import Heads
from lenskit.attention.policies import Policy
from lenskit.attention.rows import EditedRows, at_positions
from lenskit.attention.seka import KeyPolicy
from lenskit.attention.span import Span
from lenskit.attention.view import View
from lenskit.models import SCORES, Scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Queries = Literal["all", "prompt", "generated"] | Span
Schedule = Callable[[Int[Tensor, "row 1 query 1"]], Float[Tensor, "row 1 query 1"]]


@dataclass(frozen=True, repr=False)
class AttentionEdit(Displayed):
    """What ``attend`` does to one prompt: see there for each field."""

    span: Span
    policy: Policy | KeyPolicy
    heads: Heads | None = None
    queries: Queries = "all"
    start: int = 0
    schedule: Schedule | None = None
    protect_bos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.span, Span):
            raise TypeError(f"span must be a Span, as lk.span makes it; got {self.span!r}")
        if not self.of_keys and not callable(self.policy):
            raise TypeError(f"policy must be callable, such as lk.Pasta(0.01); got {self.policy!r}")
        if self.heads is None and getattr(self.policy, "names_heads", False):
            raise ValueError(
                f"{self.policy!r} needs heads: those that were found to help (Heads.load, "
                "profile_heads, KeyProjections.heads), or Heads.all(model), which hurts"
            )
        if self.heads is not None and len(self.heads) == 0:
            raise ValueError("heads is empty, so nothing would be edited")
        if isinstance(self.queries, Span):
            if self.queries.ids != self.span.ids:
                raise ValueError("queries is a span of another prompt than span")
        elif self.queries not in ("all", "prompt", "generated"):
            raise ValueError(
                f"queries must be 'all', 'prompt', 'generated' or a Span, got {self.queries!r}"
            )
        whole("start, a query's position,", self.start, 0)
        if self.of_keys:
            self._require_all_queries()

    def _require_all_queries(self) -> None:
        given = {"queries": self.queries, "start": self.start, "schedule": self.schedule}
        usual = {"queries": "all", "start": 0, "schedule": None}
        if named := [name for name in usual if given[name] != usual[name]]:
            raise ValueError(
                f"{' and '.join(named)} cannot be given with {type(self.policy).__name__}, which "
                "edits keys when they are made; every query sees them"
            )
        if self.protect_bos and self.span.positions == (0,):
            raise ValueError("the span holds the first token alone, which protect_bos leaves out")

    @property
    def of_keys(self) -> bool:
        """Whether keys are edited, and not scores."""
        return isinstance(self.policy, KeyPolicy)

    @property
    def kind(self) -> tuple:
        """What rows must share to be edited together."""
        queries = "span" if isinstance(self.queries, Span) else self.queries
        return self.policy, queries, self.start, self.schedule, self.protect_bos


class ActiveAttention(EditedRows):
    """Edits of the scores at work, of one kind.

    ``gain``: by what the bias of the coming pass is multiplied at each query; ``None``: by nothing.
    """

    def __init__(
        self, model: TransformerBridge, edits: Sequence[AttentionEdit | None], shared: bool
    ) -> None:
        super().__init__(model, edits, shared)
        first = next(edit for edit in edits if edit is not None)
        self.policy: Any = first.policy
        self.start, self.schedule = first.start, first.schedule
        self.protect_bos, self.queries = first.protect_bos, first.kind[1]
        self._asking = torch.zeros_like(self._ids, dtype=torch.bool)
        for row, edit in enumerate(edits):
            if edit is not None and isinstance(edit.queries, Span):
                self._asking[row, list(edit.queries.positions)] = True
        self._sinks = [
            getattr(getattr(block.attn, "original_component", None), "sinks", None)
            for block in model.blocks
        ]
        self.blocks = tuple(self._heads.any(0).any(-1).nonzero()[:, 0].tolist())
        self.gain = None
        self._gather()

    @property
    def gain(self) -> Float[Tensor, "row #pos"] | None:
        """The factor of the coming pass; without any, nothing is computed."""
        return self._gain

    @gain.setter
    def gain(self, gain: Float[Tensor, "row #pos"] | None) -> None:
        self._gain, self._idle = gain, gain is not None and not bool(gain.any())

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        super().batch(rows)
        self._gather()

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        super().keep(rows)
        self._gather()

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks on the attention scores of the blocks with edited heads."""
        return [(f"blocks.{block}.{SCORES}", partial(self._hooked, block)) for block in self.blocks]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the keys and queries of the coming pass; raises where the prompt is another one."""
        found = self.located(args, kwargs)
        chunk, positions, length = found.chunk, found.positions, found.length
        self._key_place = found.place[:, None, None]
        self._key_prompt = ((positions >= 0) & (positions < length))[:, None, None]
        self._key_first = (positions == 0)[:, None, None]
        asked = positions[:, -chunk.length :]
        real = chunk.real[:, -chunk.length :] & (length > 0)
        self._steps = (asked - length + 1).clamp(min=0)[:, None, :, None]
        if self.queries == "span":
            real = real & at_positions(self._asking[self._rows], asked)
        elif self.queries != "all":
            real = real & ((asked < length) == (self.queries == "prompt"))
        if self.start:
            real = real & (asked >= self.start)
        self._asked = real[:, None, :, None]
        self._any = bool(real.any())

    def change(self, scores: Scores) -> None:
        """Add the policy's bias to the scores of a block."""
        if scores.block not in self.blocks or not self._any or self._idle:
            return
        bias, cuts = self._bias(scores)
        chosen = self._gate[:, scores.block, :, None, None].to(bias.device)
        every = self._every[scores.block]
        scores.add(bias if every else torch.where(chosen, bias, 0.0))
        asked = self._asked.to(bias.device)
        if cuts and scores.emptied(asked if every else asked & chosen):
            raise ValueError(
                f"{self.policy!r} leaves a query of block {scores.block} no key to attend to; "
                "leave a token of the prompt out of the span (the first one), or choose other "
                "queries"
            )

    def _bias(self, scores: Scores) -> tuple[Tensor, bool]:
        """The bias of all heads, 0 where nothing is asked; and whether it is ``-inf`` somewhere.

        That of a static policy serves all blocks that see the same keys.
        """
        if (id(self), "bias") in scores.kept:
            return scores.kept[id(self), "bias"]
        view = self.view(scores)
        device, steps = scores.visible.device, view.steps
        bias = self.policy(view).float()
        least = float(bias.detach().min())  # NaN where there is one
        if math.isnan(least):
            raise ValueError(f"{self.policy!r} gives a bias that is not a number")
        if self.protect_bos:
            first = self._key_first[..., -view.span.shape[-1] :].to(device)
            bias = torch.where(first & ~view.span, 0.0, bias)
        if self.schedule is not None:
            bias = _times(bias, self.schedule(steps))
        if self.gain is not None:
            bias = _times(bias, self.gain.to(device)[:, None, :, None])
        bias = torch.where(self._asked.to(device) & scores.visible, bias, 0.0)
        found = bias, least == -math.inf
        if view.static:
            scores.kept[id(self), "bias"] = found
        return found

    def view(self, scores: Scores) -> View:
        """What a policy sees of a block."""
        # A window keeps the last keys alone.
        keys, device = scores.visible.shape[-1], scores.visible.device
        place, prompt, first = (
            each[..., -keys:].to(device)
            for each in (self._key_place, self._key_prompt, self._key_first)
        )
        steps = self._steps.to(device)
        return View(place, prompt, steps, scores.values, scores.sinks, scores.block, first)

    def _hooked(self, block: int, scores: Tensor, hook: Any) -> Tensor:
        floor = torch.finfo(scores.dtype).min / 2
        own = Scores(block, lambda: scores, scores > floor, self._sinks[block])
        self.change(own)
        return scores if own.bias is None else scores + own.bias.to(scores.dtype)

    def _gather(self) -> None:
        self._gate = self._heads[self._rows]
        # Rows without an edit have no bias in any case.
        edited = self._lengths[self._rows] > 0
        self._every = self._gate[edited].all(dim=(0, 2)).tolist()


def _times(
    bias: Float[Tensor, "row #head query key"], factor: Float[Tensor, "#row 1 #query 1"]
) -> Float[Tensor, "row #head query key"]:
    """The product, in which ``-inf`` times 0 is 0."""
    factor = factor.float()
    return torch.where((factor == 0) | (bias == 0), 0.0, factor * bias)
