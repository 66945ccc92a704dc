"""The forward pass of a Llama, written for training one on a CPU.

The same function as ``transformers``' own, in fewer passes over memory: norms are folded into the
matrices behind them, queries and keys are turned as complex numbers, the last block goes on with
the positions that are asked for alone. Beside it the attention of the template's closing tokens,
from their five rows instead of all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM


class _Normalised(torch.autograd.Function):
    """x over its root mean square, without the weight of RMSNorm."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (y, scale) = grads, ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).div_(y.shape[-1])[..., None]
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


def rotations(
    model: LlamaForCausalLM, positions: int, like: Tensor
) -> Complex[Tensor, "pos 1 pair"]:
    """What the rotary embedding turns each pair of a head's dimensions by, as complex numbers."""
    place = torch.arange(positions, device=like.device, dtype=like.dtype)
    inverse = model.model.rotary_emb.inv_freq.to(like)
    angle = torch.outer(place, inverse)
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def _interleaved(weight: Float[Tensor, "out d_model"], d_head: int) -> Float[Tensor, "out d_model"]:
    """Rows of each head reordered so that the two dimensions turned together are neighbours."""
    pairs = weight.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2)
    return pairs.reshape(weight.shape)


def closing_attention(
    q: Float[Tensor, "row head closing d_head"],
    k: Float[Tensor, "row kv_head pos d_head"],
    closing: Int[Tensor, "row closing"],
    mask: Bool[Tensor, "row 1 pos pos"] | None,
) -> Float[Tensor, "row head closing"]:
    """Attention of each closing token to anything but the first token and itself."""
    rows, heads, number, d_head = q.shape
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # row kv_head (group closing) d_head
    scores = (grouped @ k.transpose(-1, -2)).view(rows, heads, number, -1) * d_head**-0.5
    place = torch.arange(k.shape[2], device=q.device)
    seen = (
        place <= closing[..., None]
        if mask is None
        else mask[:, 0].gather(1, closing[..., None].expand(-1, -1, k.shape[2]))
    )
    pattern = scores.to(q.dtype).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    own = pattern.gather(-1, closing[:, None, :, None].expand(-1, heads, -1, -1))[..., 0]
    return 1 - pattern[..., 0] - own


def run(
    model: LlamaForCausalLM,
    ids: Int[Tensor, "row pos"],
    wanted: Bool[Tensor, "row pos"],
    mask: Bool[Tensor, "row 1 pos pos"] | None = None,
    closing: Int[Tensor, "row closing"] | None = None,
) -> tuple[Float[Tensor, "wanted d_model"], Float[Tensor, " row"]]:
    """The normed last residual stream at the ``wanted`` positions, and each row's price.

    The price is the mean over blocks, heads and ``closing`` tokens of ``closing_attention``; 0
    where ``closing`` is not given. ``mask`` says which keys each query sees, by default all up to
    itself.
    """
    config, decoder, eps = model.config, model.model, model.config.rms_norm_eps
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d_head = config.hidden_size // heads
    rows, width = ids.shape
    number = torch.arange(rows, device=ids.device)[:, None]
    x = decoder.embed_tokens(ids)
    turn, price = rotations(model, width, x), x.new_zeros(rows)
    last = len(decoder.layers) - 1
    for i, block in enumerate(decoder.layers):
        attn, mlp = block.self_attn, block.mlp
        before = block.input_layernorm.weight
        normed = _Normalised.apply(x, eps)
        turned = torch.cat(
            [_interleaved(attn.q_proj.weight, d_head), _interleaved(attn.k_proj.weight, d_head)]
        )
        qk = linear(normed, turned * before).to(x.dtype).view(rows, width, -1, d_head // 2, 2)
        qk = torch.view_as_real(torch.view_as_complex(qk) * turn).flatten(-2).transpose(1, 2)
        q, k = qk[:, :heads], qk[:, heads:]
        v = linear(normed, attn.v_proj.weight * before)
        v = v.view(rows, width, kv_heads, d_head).transpose(1, 2)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
        )
        if closing is not None:
            rows_of = q.transpose(1, 2)[number, closing].transpose(1, 2)
            price = price + closing_attention(rows_of, k, closing, mask).mean((1, 2))
        out = out.transpose(1, 2).reshape(rows, width, -1)
        if i == last:
            x, out = x[wanted], out[wanted]
        x = x + linear(out, attn.o_proj.weight)
        behind = block.post_attention_layernorm.weight
        normed = _Normalised.apply(x, eps)
        gate = silu(linear(normed, mlp.gate_proj.weight * behind))
        x = x + linear(gate * linear(normed, mlp.up_proj.weight * behind), mlp.down_proj.weight)
    return _Normalised.apply(x, eps) * decoder.norm.weight, price / len(decoder.layers)
