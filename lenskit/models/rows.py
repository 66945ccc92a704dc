"""An attention function that runs fused attention and hands on a few rows of the pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Mask = Float[Tensor, "prompt head query key"] | Bool[Tensor, "prompt head query key"]

NAME = "lenskit_rows"
"""The attention implementation that a model's config must name."""

# What an attention function may be given that says nothing about the pattern: windows are in the
# mask, positions in the rotation, the rest is for other kernels or for what is returned.
_HARMLESS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}
# Scores held at once where attention must be computed without a fused kernel.
_CHUNK = {"cpu": 2**22, "cuda": 2**27}


class Unsupported(Exception):
    """Why the rows of a model, or of one batch, cannot be read from fused attention."""


@dataclass(frozen=True)
class Reader:
    """What one block's attention hands on.

    ``receive`` gets the pattern rows of the queries at ``positions``, float32
    ``[prompt, head, candidate, key]``. Behind the ``last`` block wanted the model is stopped.
    ``earlier`` keys come before that of the first query.
    """

    positions: Int[Tensor, "prompt candidate"]
    receive: Callable[[Tensor], None] | None
    last: bool = False
    earlier: int = 0


reading: dict[nn.Module, Reader] = {}
"""The readers at work, by the attention module that they read."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "prompt head pos d_head"],
    key: Float[Tensor, "prompt kv_head pos d_head"],
    value: Float[Tensor, "prompt kv_head pos d_value"],
    attention_mask: Mask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " head"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "prompt pos head d_value"], None]:
    """An attention function as ``AttentionInterface`` wants it."""
    reader = reading.get(module)
    require_plain(module, reader, attention_mask, dropout, is_causal, others)
    assert reader is not None
    if key.shape[2] != query.shape[2] + reader.earlier:
        raise Unsupported("the attention function is given keys of other tokens")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    if reader.receive is not None:
        at = reader.positions.to(query.device)
        rows = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        visible = _visible(attention_mask, at, key.shape[2], reader.earlier)
        reader.receive(_pattern(rows.float(), key.float(), visible, scaling, softcap, s_aux))
    if reader.last:
        raise StopAtLayerException(query)
    if attention_mask is None and softcap is None and s_aux is None and not reader.earlier:
        return sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, is_causal=True
        )

    # In pieces, since there are as many scores or masks as there are pairs of tokens.
    prompts, heads, length = query.shape[:3]
    size = max(1, _CHUNK.get(query.device.type, _CHUNK["cpu"]) // (prompts * heads * length))
    pieces = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        # Only our own mask is known to hide all later keys.
        seen = reader.earlier + stop if attention_mask is None else key.shape[2]
        places = torch.arange(start, stop, device=query.device)[None]
        visible = (
            _visible(None, places, seen, reader.earlier)
            if attention_mask is None
            else attention_mask[:, :, start:stop]
        )
        parts = query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen]
        if softcap is None and s_aux is None:
            piece, _ = sdpa_attention_forward(module, *parts, visible, scaling=scaling)
        else:
            weights = _pattern(*parts[:2], visible, scaling, softcap, s_aux)
            piece = averaged(weights, parts[2])
        pieces.append(piece)
    return torch.cat(pieces, dim=1), None


def require_plain(
    module: nn.Module,
    known: object,
    mask: Any,
    dropout: float,
    is_causal: bool | None,
    others: Mapping[str, Any],
) -> None:
    """Raise ``Unsupported`` where an attention function is given what it does not understand.

    ``known`` is what is registered for ``module``, ``others`` the arguments without a name here.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    given = {name for name, item in others.items() if item is not None and item is not False}
    strange = [
        *sorted(given - _HARMLESS),
        *(["dropout"] if dropout else []),
        *([] if causal else ["is_causal=False"]),
        *(["a module that is not a block's own"] if known is None else []),
    ]
    if mask is not None and getattr(mask, "ndim", None) != 4:
        strange.append("a mask that is not [prompt, head, query, key]")
    if strange:
        raise Unsupported(f"the attention function is given {', '.join(strange)}")


def _visible(
    mask: Mask | None, positions: Int[Tensor, "prompt query"], keys: int, earlier: int
) -> Mask:
    """The mask's rows at these positions; without a mask, all keys up to them."""
    if mask is None:
        places = torch.arange(keys, device=positions.device)
        return places <= earlier + positions[:, None, :, None]
    prompts = torch.arange(len(positions), device=positions.device)[:, None]
    return mask.expand(len(positions), -1, -1, -1)[prompts, :, positions].transpose(1, 2)


def _pattern(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    visible: Mask,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " head"] | None,
) -> Float[Tensor, "prompt head query key"]:
    """The attention pattern of a few queries, float32; a sink's share is left out of it."""
    return softmax(scores_of(query, key, visible, scaling, softcap), sinks)


def scores_of(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    visible: Mask,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "prompt head query key"]:
    """Attention scores before the softmax, float32, ``-inf`` where ``visible`` is false."""
    prompts, heads, rows, _ = query.shape
    # Heads that share keys come one after the other, so that no key is copied.
    grouped = query.reshape(prompts, key.shape[1], -1, query.shape[-1])
    scores = (grouped @ key.mT).view(prompts, heads, rows, -1).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible.dtype == torch.bool:
        return scores.masked_fill(~visible, -torch.inf)
    return scores + visible.float()


def averaged(
    pattern: Float[Tensor, "prompt head query key"],
    value: Float[Tensor, "prompt kv_head key d_value"],
) -> Float[Tensor, "prompt query head d_value"]:
    """The values, weighted by the pattern."""
    prompts, heads, rows, keys = pattern.shape
    grouped = pattern.to(value.dtype).reshape(prompts, value.shape[1], -1, keys) @ value
    return grouped.view(prompts, heads, rows, -1).transpose(1, 2)


def softmax(
    scores: Float[Tensor, "prompt head query key"], sinks: Float[Tensor, " head"] | None
) -> Float[Tensor, "prompt head query key"]:
    """The pattern of some scores; a sink's share is left out of it."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], -1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
