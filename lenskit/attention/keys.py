"""Edits of keys at work: the keys of each row's span are changed in the pass that makes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from lenskit.attention.rows import EditedRows
from lenskit.models import head_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.attention.edit import AttentionEdit
    from lenskit.attention.span import Span


class ActiveKeys(EditedRows):
    """Edits of the keys at work, of one kind."""

    what = "keys are edited"

    def __init__(
        self, model: TransformerBridge, edits: Sequence[AttentionEdit | None], shared: bool
    ) -> None:
        super().__init__(model, edits, shared)
        self._model, self._hooks = model, head_hooks(model)
        first = next(edit for edit in edits if edit is not None)
        if first.protect_bos:
            self._places[:, 0] = 0
        numbers: dict[Span, int] = {}
        which = [
            0 if edit is None else numbers.setdefault(edit.span, len(numbers)) for edit in edits
        ]
        spans = list(numbers)
        policy: Any = first.policy
        self._maps, weights = policy.maps(model), policy.weights(model, spans)
        self._require_shapes(weights, len(spans))
        # A head's keys are those of its key-value head.
        gates = self._heads.unflatten(2, (self._hooks.kv_heads, -1)).any(dim=-1)
        self._weights = weights[which].float() * gates[:, None]
        used = self._weights.any(0) & self._maps.flatten(3).any(-1)
        self.blocks = tuple(used.any(0).any(-1).nonzero()[:, 0].tolist())
        self._moved: dict[int, Tensor] = {}
        self._made = 0

    @property
    def obstacle(self) -> str:
        """Why generation must not use fused attention, in words; empty where it may."""
        return self._hooks.obstacle

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        super().batch(rows)
        self._made = 0

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks on the keys of the blocks with edited heads, before they are rotated."""
        return [(self._hooks.keys[block], partial(self._hooked, block)) for block in self.blocks]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the span's keys among those of the coming pass.

        Raises where the prompt is another one, and where earlier keys were made elsewhere, so that
        they lack the edit.
        """
        found = self.located(args, kwargs)
        chunk = found.chunk
        if chunk.earlier > self._made:
            raise ValueError(
                f"{chunk.earlier} keys are in the cache, of which {self._made} were made under "
                "this edit; keys are edited when they are made, so let the whole prompt run inside "
                "attend"
            )
        self._made = chunk.real.shape[1]
        place = found.place[:, -chunk.length :].masked_fill(~chunk.real[:, -chunk.length :], -1)
        self._row, self._at = (place >= 0).nonzero(as_tuple=True)

    def _hooked(self, block: int, keys: Tensor, hook: Any) -> Tensor:
        if len(self._row) == 0:
            return keys
        # Never in place: the keys may be what another hook has kept.
        edited = keys.clone()
        heads = self._hooks.split(self._model, self._hooks.keys[block], edited)
        row, at = self._row.to(keys.device), self._at.to(keys.device)
        exact = torch.promote_types(keys.dtype, torch.float32)
        own = heads[row, at].to(exact)
        if (maps := self._moved.get(block)) is None or maps.device != keys.device:
            maps = self._moved[block] = self._maps[:, block].to(keys.device)
        weights = self._weights[self._rows, :, block].to(keys.device, exact)
        each = weights[row] if len(weights) > 1 else weights.expand(len(row), -1, -1)
        change = torch.einsum("nhd,phed,nph->nhe", own, maps.to(exact), each)
        heads[row, at] = (own + change).to(keys.dtype)
        return edited

    def _require_shapes(self, weights: Tensor, spans: int) -> None:
        size = (self._heads.shape[1], self._hooks.kv_heads, self._hooks.d_head)
        parts = self._maps.shape[0]
        for name, given, wanted in (
            ("maps", self._maps, (parts, *size, size[2])),
            ("weights", weights, (spans, parts, *size[:2])),
        ):
            if tuple(given.shape) != wanted:
                raise ValueError(
                    f"{name} of the key policy must be {wanted} for this model, "
                    f"got {tuple(given.shape)}"
                )
            if not bool(given.isfinite().all()):
                raise ValueError(f"{name} of the key policy are not finite")
