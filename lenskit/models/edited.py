"""Attention with edited scores: what edits see of a block, eager by hooks or in fused attention.

In generation each block's own attention module takes the place of the bridge's and calls a
function of ours. It runs the library's fused attention; where an edit adds a bias it goes into the
mask, and only an edit that looks at the scores has them computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lenskit.models.rows import Mask, averaged, require_plain, scores_of, softmax

NAME = "lenskit_edited"
"""The attention implementation that a model's config must name."""


class Scores:
    """The attention scores of one block in one pass, and what edits add to them.

    ``visible``: which keys a query sees. ``bias`` is the sum of what was added so far, ``None``
    for nothing. ``sinks``: learned sinks, one logit a head. ``kept`` is shared by the blocks of one
    pass that have the same ``visible``.
    """

    def __init__(
        self,
        block: int,
        compute: Callable[[], Float[Tensor, "row head query key"]],
        visible: Bool[Tensor, "row head query key"],
        sinks: Float[Tensor, " head"] | None = None,
        kept: dict[Any, Any] | None = None,
    ) -> None:
        self.block, self.visible, self.sinks = block, visible, sinks
        self.kept = {} if kept is None else kept
        self.bias: Tensor | None = None
        self._compute = compute
        self._computed: Tensor | None = None

    @property
    def computed(self) -> bool:
        """Whether anybody has asked for the scores."""
        return self._computed is not None

    def values(self) -> Float[Tensor, "row head query key"]:
        """The scores with all that was added, float32, ``-inf`` on hidden keys."""
        if self._computed is None:
            self._computed = self._compute().float().masked_fill(~self.visible, -torch.inf)
        return self._computed if self.bias is None else self._computed + self.bias

    def add(self, bias: Float[Tensor, "row head query key"]) -> None:
        """Add a bias, which may be ``-inf``."""
        self.bias = bias if self.bias is None else self.bias + bias

    def emptied(self, asked: Bool[Tensor, "row head query 1"]) -> bool:
        """Whether a bias of ``-inf`` leaves one of these queries no key."""
        if self.bias is None:
            return False
        alive = (self.visible & (self.bias > -torch.inf)).any(dim=-1, keepdim=True)
        return bool((asked & ~alive).any())


class ScoreEdit(Protocol):
    """An edit that changes attention scores (besides what ``lenskit.models.active`` asks)."""

    def change(self, scores: Scores) -> None: ...


class Kept:
    """What the blocks of one pass share: which keys are seen, and what edits made of that.

    Blocks with and without a window are given different masks.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Mask | None, tuple[int, ...], dict[Any, Any]]] = []

    def clear(self) -> None:
        """A new pass begins."""
        self._kept.clear()

    def of(self, mask: Mask | None, query: Tensor, key: Tensor) -> dict[Any, Any]:
        """What is kept for this mask; ``"visible"`` in any case."""
        shape = (*query.shape[:3:2], key.shape[2])
        for known, of_shape, kept in self._kept:
            if known is mask and of_shape == shape:
                return kept
        self._kept.append((mask, shape, {"visible": _visible(mask, query, key)}))
        return self._kept[-1][2]


@dataclass(frozen=True)
class Site:
    """A block's number and the edits of its scores, the outermost first.

    ``kept`` is the same for all blocks, and cleared by the first.
    """

    block: int
    edits: Sequence[ScoreEdit]
    kept: Kept = field(default_factory=Kept)


editing: dict[nn.Module, Site] = {}
"""The edits at work, by the attention module whose scores they change."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "row head query d_head"],
    key: Float[Tensor, "row kv_head key d_head"],
    value: Float[Tensor, "row kv_head key d_value"],
    attention_mask: Mask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " head"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "row query head d_value"], None]:
    """An attention function as ``AttentionInterface`` wants it, with cached keys."""
    site = editing.get(module)
    require_plain(module, site, attention_mask, dropout, is_causal, others)
    assert site is not None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    manual = softcap is not None or s_aux is not None
    if not site.edits and not manual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
        )

    if site.block == 0:
        site.kept.clear()
    kept = site.kept.of(attention_mask, query, key)
    visible = kept["visible"]
    scores = Scores(
        site.block,
        lambda: scores_of(query.float(), key.float(), visible, scaling, softcap),
        visible,
        s_aux,
        kept,
    )
    for edit in site.edits:
        edit.change(scores)
    if scores.bias is None and not manual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
        )
    if manual or scores.computed:
        return averaged(softmax(scores.values(), s_aux), value), None
    assert scores.bias is not None
    mask = _as_mask(scores.bias, kept, query)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


def _as_mask(
    bias: Float[Tensor, "row head query key"], kept: dict[Any, Any], query: Tensor
) -> Float[Tensor, "row head query key"]:
    """The bias, and the least number on hidden keys; one bias of several blocks is masked once."""
    if kept.get("bias") is not bias:
        least = torch.finfo(query.dtype).min
        mask = bias.to(query.dtype).masked_fill(~kept["visible"], least)
        kept["bias"], kept["mask"] = bias, mask.expand(-1, -1, query.shape[2], -1)
    return kept["mask"]


def _visible(mask: Mask | None, query: Tensor, key: Tensor) -> Bool[Tensor, "row head query key"]:
    """Which keys each query sees; without a mask all up to itself, which is behind those cached."""
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # A query that sees nothing, which only padding does, must not become NaN.
        return seen | ~seen.any(dim=-1, keepdim=True)
    queries, keys = query.shape[2], key.shape[2]
    places = torch.arange(keys, device=query.device)
    return (places <= places[keys - queries :, None])[None, None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
