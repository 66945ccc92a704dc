"""A head's direct contribution from the span to the answer, by one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lenskit._arguments import whole
from lenskit.models import (
    PATTERN,
    RESID,
    ModelCheckError,
    Tokens,
    chat_ids,
    hooked,
    model_report,
    require_positions,
    rows_of,
    run_plain,
)
from lenskit.tasks import TaskPrompt, emphasised_span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Of the first, all positions are read; of the others the last one.
_WHOLE = "attn.hook_v"
_LAST = (PATTERN, "attn.hook_z", "attn.o.hook_out", "hook_resid_pre", RESID)
_BESIDE = ("hook_resid_mid", "hook_mlp_out")


@torch.no_grad()
def contributions(
    model: TransformerBridge,
    prompts: Sequence[TaskPrompt],
    *,
    before: str = "",
    batch_size: int = 64,
    template_arguments: Mapping[str, Any] | None = None,
) -> Float[Tensor, "prompt block head"]:
    """How much more the span says for the answer through each head than the rest of the prompt.

    With ``a`` the pattern of the prompt's last token, ``v_k W_O`` what key ``k`` writes through the
    head, and ``u`` the unembedding of the answer's first token minus the mean over the vocabulary,
    it is ``Σ_{k in span} a_k (v_k W_O)·u - Σ_{k outside} a_k (v_k W_O)·u``, as in LOCOS (arXiv
    2607.01002). ``u`` is led back through the final norm (and the norm behind attention where a
    model has one) with the scale that it has there: the unit is logits, before a soft cap.

    ``before``: what stands before a prompt's ``target`` in the answer, such as ``" "`` for bare
    text. One forward pass for each prompt. The direct path alone: what later blocks make of a
    head's output does not count. What steers the model steers these passes too.

    Raises ModelCheckError unless values, pattern and output projection add up to what each block's
    attention writes, and ValueError for prompts without a target.

    >>> prompts = lk.tasks.embedded("format", 2, kind="json").prompts
    >>> lk.profiling.contributions(model, prompts).shape
    torch.Size([2, 8, 8])
    """
    batch_size = whole("batch_size", batch_size, 1)
    _require_hooks(model)
    prompts = list(prompts)
    answers = torch.tensor([_first_token(model, prompt, before) for prompt in prompts])
    spans = [emphasised_span(model, p, template_arguments=template_arguments) for p in prompts]
    tokens = chat_ids(
        model, [prompt.messages for prompt in prompts], template_arguments=template_arguments
    )
    require_positions(model, tokens)
    inside = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for row, span in enumerate(spans):
        start = inside.shape[1] - span.length
        inside[row, [start + position for position in span.positions]] = True
    out = torch.zeros(len(prompts), model.cfg.n_layers, model.cfg.n_heads)
    with rows_of(model, len(prompts), "prompts") as edits:
        for rows in tokens.lengths.argsort(stable=True).split(batch_size):
            for edit in edits:
                edit.batch(rows)
            batch = tokens.rows(rows).trimmed()
            own = inside[rows][:, -batch.input_ids.shape[1] :]
            out[rows] = _of_batch(model, batch, answers[rows], own)
    if not bool(out.isfinite().all()):
        raise ValueError("the contributions are not finite; another dtype may help")
    return out


def _of_batch(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Int[Tensor, " row"],
    inside: Tensor,
) -> Float[Tensor, "row block head"]:
    seen: dict[tuple[int, str], Tensor] = {}

    def reader(block: int, kind: str) -> Callable[..., None]:
        def read(value: Tensor, hook: Any) -> None:
            if kind == PATTERN:
                value = value[:, :, -1]
            elif kind != _WHOLE:
                value = value[:, -1]
            seen[block, kind] = value.detach().clone()

        return read

    blocks = range(model.cfg.n_layers)
    kinds = [_WHOLE, *_LAST, *(kind for kind in _BESIDE if kind in model_report(model).fires)]
    names = {
        f"blocks.{block}.{kind}": reader(block, kind)
        for block in blocks
        for kind in kinds
        if f"blocks.{block}.{kind}" in model.hook_dict
    }
    hf_model: Any = model.original_model
    with hooked(model, list(names.items())):
        run_plain(hf_model, tokens, use_cache=False)
    weight = hf_model.get_output_embeddings().weight
    answer = weight[answers.to(weight.device)].float() - weight.float().mean(dim=0)
    final = seen[blocks[-1], RESID]
    answer = _led_back(model.ln_final, final, answer.to(final.device))
    return torch.stack(
        [
            _of_block(
                model, block, {kind: seen.get((block, kind)) for kind in kinds}, answer, inside
            )
            for block in blocks
        ],
        dim=1,
    )


def _of_block(
    model: TransformerBridge,
    block: int,
    seen: Mapping[str, Any],
    answer: Float[Tensor, "row d_model"],
    inside: Tensor,
) -> Float[Tensor, "row head"]:
    attention = model.blocks[block].attn
    heads = model.cfg.n_heads
    pattern, value, z, wrote = (
        seen[kind].float() for kind in (PATTERN, _WHOLE, "attn.hook_z", "attn.o.hook_out")
    )
    if value.ndim != 4 or value.shape[1] != pattern.shape[-1] or heads % value.shape[2]:
        raise _unreadable(block, f"its values are of shape {tuple(value.shape)}")
    # Query heads that share a key-value head lie one behind the other.
    value = value.repeat_interleave(heads // value.shape[2], dim=2)
    _require_same(block, "z", torch.einsum("rhk,rkhd->rhd", pattern, value), z)
    out = attention.W_O.to(value.device).float()
    bias = getattr(attention.o.original_component, "bias", None)
    summed = torch.einsum("rhd,hdm->rm", z, out) + (0.0 if bias is None else bias.float())
    _require_same(block, "the output projection", summed, wrote)
    answer = answer.to(value.device)
    behind = getattr(model.blocks[block], "ln1_post", None)
    added = wrote if behind is None else _applied(behind, seen["attn.o.hook_out"])
    mid, mlp = (seen.get(kind) for kind in _BESIDE)
    if mid is None:
        if mlp is None:
            raise _unreadable(block, "neither hook_resid_mid nor hook_mlp_out fires")
        mid = seen[RESID].float() - mlp.float()
    _require_same(block, "the residual stream", seen["hook_resid_pre"].float() + added, mid)
    if behind is not None:
        answer = _led_back(behind, seen["attn.o.hook_out"], answer)
    worth = torch.einsum("rkhd,hdm,rm->rhk", value, out, answer)
    sign = torch.where(inside.to(worth.device), 1.0, -1.0)[:, None]
    return (pattern * worth * sign).sum(dim=-1).cpu()


def _led_back(
    norm: nn.Module, at: Float[Tensor, "row d_model"], direction: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_model"]:
    """What to multiply a norm's input by to get its part in ``norm(x)·direction``.

    The norm is taken as linear, with the scale that it has ``at``; ``norm(x) = gain x / σ + bias``,
    or ``gain (x - mean) / σ + bias``. Raises ModelCheckError for a norm of another kind.
    """
    signs = torch.ones(1, at.shape[-1], device=at.device)
    signs[:, 1::2] = -1
    # Its mean is 0 and its scale 64, beside which a norm's ε is nothing.
    plus, minus = _applied(norm, 64 * signs), _applied(norm, -64 * signs)
    gain, bias = (plus - minus) / 2 * signs, (plus + minus) / 2
    centres = torch.allclose(_applied(norm, 64 * signs + 64), plus, rtol=1e-2, atol=1e-3)
    x = at.float()
    x = x - x.mean(dim=-1, keepdim=True) if centres else x
    scaled, given = gain * x, _applied(norm, at) - bias
    inverse = (scaled * given).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
    if (scaled * inverse - given).abs().max() > _tolerance(at) * given.abs().max():
        raise ModelCheckError(f"{type(norm).__name__} is no norm that a direction is led through")
    back = gain * direction
    back = back - back.mean(dim=-1, keepdim=True) if centres else back
    return back * inverse


def _applied(norm: Any, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    own = getattr(norm, "original_component", norm)
    weight = next(own.parameters(), x)
    return own(x[:, None].to(weight.device, weight.dtype))[:, 0].float().to(x.device)


def _require_hooks(model: TransformerBridge) -> None:
    """``attn.o.hook_out`` is not among the hooks that are probed at load."""
    fires = model_report(model).fires
    needed = (_WHOLE, *(kind for kind in _LAST if kind != "attn.o.hook_out"))
    missing = [kind for kind in needed if kind not in fires]
    blocks = range(model.cfg.n_layers)
    if any(f"blocks.{block}.attn.o.hook_out" not in model.hook_dict for block in blocks):
        missing.append("attn.o.hook_out")
    if not hasattr(model, "ln_final"):
        missing.append("ln_final")
    if model.cfg.d_model % 2:
        missing.append("an even d_model")
    if missing:
        raise ModelCheckError(
            f"contributions of heads cannot be read from this model, for want of "
            f"{', '.join(missing)}; use stage='blocks' or 'heads'"
        )


def _require_same(block: int, what: str, one: Tensor, other: Tensor) -> None:
    if one.numel() != other.numel() or not bool(
        (one.flatten(1) - other.float().flatten(1)).abs().max()
        <= _tolerance(other) * other.abs().max()
    ):
        raise _unreadable(block, f"its parts do not add up to {what}")


def _tolerance(value: Tensor) -> float:
    return 1e-3 if value.dtype == torch.float32 else 5e-2


def _unreadable(block: int, why: str) -> ModelCheckError:
    return ModelCheckError(
        f"contributions of the heads of block {block} cannot be read: {why}; use stage='blocks' or "
        "'heads'"
    )


def _first_token(model: TransformerBridge, prompt: TaskPrompt, before: str) -> int:
    ids = model.tokenizer(before + prompt.target, add_special_tokens=False)["input_ids"]
    if not prompt.target or not ids:
        raise ValueError(
            f"the prompt {prompt.messages[-1]['content']!r} has no target whose first token could "
            "be looked for"
        )
    return int(ids[0])
