"""Forward passes whose activations are read or replaced, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.models import (
    ModelCheckError,
    Tokens,
    hooked,
    in_batches,
    model_report,
    pad_left,
    run_plain,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

At: TypeAlias = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]

HOOKS: Mapping[str, str] = MappingProxyType(
    {name: "attn.hook_z" if name == "z" else f"hook_{name}" for name in get_args(At)}
)
"""The hook of each kind of site, behind ``blocks.{l}.``."""

_landed: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def hook_name(block: int, at: str) -> str:
    """The full name of a block's hook."""
    return f"blocks.{block}.{HOOKS[at]}"


def padded(model: TransformerBridge, rows: Sequence[Sequence[int]]) -> Tokens:
    """Token ids of several lengths, left padded."""
    return pad_left(rows, model.tokenizer.pad_token_id)


def last_logits(
    model: TransformerBridge, tokens: Tokens, kept: int, hooks: Sequence[tuple[str, Any]]
) -> Float[Tensor, "row pos vocab"]:
    """Float32 logits at the last ``kept`` positions, of one batch under hooks."""
    hf_model: Any = model.original_model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        options["logits_to_keep"] = kept
    with hooked(model, hooks):
        return run_plain(hf_model, tokens, **options).logits[:, -kept:].float()


def activations(
    model: TransformerBridge,
    rows: Sequence[Sequence[int]],
    at: str,
    receive: Callable[[int, Float[Tensor, "block pos *width"], Float[Tensor, "pos vocab"]], None],
    *,
    kept: int = 1,
    batch_size: int = 64,
) -> None:
    """Hand ``receive`` each row's number, its activations in every block, and its last logits."""
    tokens = padded(model, rows)
    blocks = range(model.cfg.n_layers)

    def run(index: Tensor) -> None:
        batch = tokens.rows(index).trimmed()
        found: dict[int, Tensor] = {}

        def reader(block: int) -> Callable[..., None]:
            def read(value: Tensor, hook: Any) -> None:
                found[block] = value.to(model.cfg.device, copy=True)

            return read

        logits = last_logits(model, batch, kept, [(hook_name(b, at), reader(b)) for b in blocks])
        _check_width(model, at, found[0])
        for i, row in enumerate(index.tolist()):
            own = torch.stack([found[block][i, -len(rows[row]) :] for block in blocks])
            receive(row, own, logits[i])

    in_batches(tokens, batch_size, run, progress=False, description="Reading activations")


def require_landing(model: TransformerBridge, at: str, ids: Sequence[int]) -> None:
    """Raise ``ModelCheckError`` unless edits at this kind of site change the model's logits.

    Tried once for each model, in its first and its last block.
    """
    if at not in HOOKS:
        raise ValueError(f"at must be one of {', '.join(HOOKS)}; got {at!r}")
    if at in _landed.setdefault(model, set()):
        return
    if HOOKS[at] not in model_report(model).fires:
        raise ModelCheckError(f"{HOOKS[at]} does not fire in every block of this model")
    tokens = padded(model, [ids])

    def other_coordinates(value: Tensor, hook: Any) -> Tensor:
        return value.roll(1, dims=-1)

    plain = last_logits(model, tokens, 1, [])
    for block in {0, model.cfg.n_layers - 1}:
        edited = last_logits(model, tokens, 1, [(hook_name(block, at), other_coordinates)])
        if not bool((edited - plain).abs().max() > 1e-6 * plain.abs().max()):
            raise ModelCheckError(
                f"editing {HOOKS[at]} of block {block} does not change this model's logits"
            )
    _landed[model].add(at)


def _check_width(model: TransformerBridge, at: str, value: Tensor) -> None:
    if at == "z" and value.shape[2:3] != (model.cfg.n_heads,):
        raise ModelCheckError(
            f"attn.hook_z is {list(value.shape)} and not [row, pos, {model.cfg.n_heads} heads, "
            "d_head] in this model, so that its heads cannot be told apart; use at='attn_out'"
        )
