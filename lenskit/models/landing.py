"""Whether an edited key lands: its scores change, in proportion, and no others do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.models.check import PATTERN, SCORES, model_report
from lenskit.models.fused import state_of
from lenskit.models.reference import ModelCheckError, run_plain
from lenskit.models.templates import Tokens
from lenskit.models.use import hooked

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.models.keys import HeadHooks


def require_landing(model: TransformerBridge, hooks: HeadHooks, block: int, tokens: Tokens) -> None:
    """Raise ``ModelCheckError`` unless moving a key moves its scores, and those alone, as much.

    Each prompt stands in three rows: as it is, with one key moved, and moved twice as far.
    """
    number, width = tokens.input_ids.shape
    key, head = width - 3, hooks.kv_heads - 1
    tripled = tokens.rows([row for row in range(number) for _ in range(3)])
    times = torch.arange(3.0).repeat(number)

    def move(value: Tensor, hook: Any) -> Tensor:
        moved = value.clone()
        own = hooks.split(model, hooks.keys[block], moved)[:, key, head]
        own += (times.to(own.device)[:, None] * _step(own)).to(own.dtype)
        return moved

    with hooked(model, [(hooks.keys[block], move)]):
        scores = _scores(model, block, tripled).unflatten(0, (number, 3))
    once, twice = scores[:, 1] - scores[:, 0], scores[:, 2] - scores[:, 0]
    # The scores of the future and of padding are no numbers that could be compared.
    seen = scores.isfinite().all(dim=1) & (scores[:, 0] > torch.finfo(torch.float16).min)
    there = torch.zeros(seen.shape[1:], dtype=torch.bool)
    there[head * (hooks.heads // hooks.kv_heads) :, key:, key] = True
    large = once[seen & there].abs().max()
    slack = (5e-2 if in_half(model) else 1e-3) * scores[:, 0][seen].abs().max().clamp(min=large)
    where = f"a key moved at {hooks.keys[block]}"
    if not large > slack:
        raise ModelCheckError(f"{where} does not change its scores")
    if bool((once[seen & ~there].abs() > slack).any()):
        raise ModelCheckError(f"{where} changes scores of other keys or heads")
    if bool(((twice - 2 * once)[seen].abs() > slack).any()):
        raise ModelCheckError(
            f"{where} does not change its scores in proportion, perhaps because keys are "
            "normalised behind it"
        )


def _step(own: Float[Tensor, "row d_head"]) -> Float[Tensor, "row d_head"]:
    """As long as the keys themselves, in a direction of its own."""
    signs = torch.ones(own.shape[-1], device=own.device)
    signs[1::3] = -1
    return signs * own.detach().float().square().mean(dim=-1, keepdim=True).sqrt()


def _scores(
    model: TransformerBridge, block: int, tokens: Tokens
) -> Float[Tensor, "row head query key"]:
    """A block's scores before a soft cap, on the CPU; ``-inf`` or very low where keys are hidden.

    Where the model has no true ones to read, the logarithm of the pattern, which differs from
    them by what is the same for all keys: it is taken relative to that of the last key before the
    moved one.
    """
    true = SCORES in model_report(model).edits
    found: list[Tensor] = []

    def read(value: Tensor, hook: Any) -> None:
        found.append(value.detach().float().cpu())

    with hooked(model, [(f"blocks.{block}.{SCORES if true else PATTERN}", read)]):
        last_logits(model, tokens)
    scores = found[0].double()
    if not true:
        scores = torch.where(scores > 1e-30, scores.log(), -torch.inf)
        return scores - scores[..., -4:-3]
    native = model.blocks[block].attn.original_component
    cap = getattr(native, "attn_logit_softcapping", None)
    if cap is not None:
        hidden = scores < -cap
        scores = torch.where(hidden, -torch.inf, cap * (scores / cap).clamp(-1, 1).atanh())
    return scores


def edited_logits(model: TransformerBridge, hooks: HeadHooks, tokens: Tokens) -> Tensor:
    """The last logits with one key of each head moved in every block."""
    key = tokens.input_ids.shape[1] - 3

    def move(name: str) -> Callable[..., Tensor]:
        def moved(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            own = hooks.split(model, name, value)[:, key]
            own += _step(own).to(own.dtype)
            return value

        return moved

    with hooked(model, [(name, move(name)) for name in hooks.keys]):
        return last_logits(model, tokens)


def last_logits(model: TransformerBridge, tokens: Tokens) -> Tensor:
    hf_model: Any = model.original_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = run_plain(hf_model, tokens, use_cache=False)
    return output.logits[:, -1].float()


def in_half(model: TransformerBridge) -> bool:
    return state_of(model)[0] in (torch.float16, torch.bfloat16)
