"""Attention with edited scores: what edits see of a block, eager by hooks or in fused attention.

In generation each block's own attention module takes the place of the bridge's and calls a
function of ours. It runs the library's fused attention; where an edit adds a bias it goes into the
mask, and only an edit that looks at the scores has them computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    for nothing. ``sinks``: learned sinks, one logit a head.
    """

    def __init__(
        self,
        block: int,
        compute: Callable[[], Float[Tensor, "row head query key"]],
        visible: Bool[Tensor, "row head query key"],
        sinks: Float[Tensor, " head"] | None = None,
    ) -> None:
        self.block, self.visible, self.sinks = block, visible, sinks
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


@dataclass(frozen=True)
class Site:
    """A block's number and the edits of its scores, the outermost first."""

    block: int
    edits: Sequence[ScoreEdit]


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

    visible = _visible(attention_mask, query, key)
    scores = Scores(
        site.block,
        lambda: scores_of(query.float(), key.float(), visible, scaling, softcap),
        visible,
        s_aux,
    )
    for edit in site.edits:
        edit.change(scores)
    if scores.bias is None and not manual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
        )
    if manual or scores.computed:
        # A query that sees nothing, which only padding does, must not become NaN.
        pattern = softmax(scores.values(), s_aux).nan_to_num(0.0)
        return averaged(pattern, value), None
    assert scores.bias is not None
    least = torch.finfo(query.dtype).min
    mask = scores.bias.to(query.dtype).masked_fill(~visible, least)
    return sdpa_attention_forward(
        module, query, key, value, mask.expand(-1, -1, query.shape[2], -1), scaling=scaling
    )


def _visible(mask: Mask | None, query: Tensor, key: Tensor) -> Bool[Tensor, "row head query key"]:
    """Which keys each query sees; without a mask all up to itself, which is behind those cached."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    queries, keys = query.shape[2], key.shape[2]
    places = torch.arange(keys, device=query.device)
    return (places <= places[keys - queries :, None])[None, None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
