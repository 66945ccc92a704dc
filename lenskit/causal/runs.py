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

    from lenskit.causal.prompts import Read

At: TypeAlias = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]

HOOKS: Mapping[str, str] = MappingProxyType(
    {name: "attn.hook_z" if name == "z" else f"hook_{name}" for name in get_args(At)}
)
"""The hook of each kind of site, behind ``blocks.{l}.``."""

_landed: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def hook_name(block: int, at: str) -> str:
    """The full name of a block's hook."""
    return f"blocks.{block}.{HOOKS[at]}"


def padded(model: TransformerBridge, rows: Sequence[Read]) -> Tokens:
    """The token ids of prompts of several lengths, left padded."""
    return pad_left([row.ids for row in rows], model.tokenizer.pad_token_id)


def shifts(rows: Sequence[Read], width: int) -> list[tuple[str, Any]]:
    """Hooks that shift what enters the first block, in the rows of a left-padded batch."""
    if all(row.shift is None for row in rows):
        return []

    def move(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        for i, row in enumerate(rows):
            if row.shift is not None:
                start = width - len(row)
                value[i, start : start + len(row.shift)] += row.shift.to(value)
        return value

    return [(hook_name(0, "resid_pre"), move)]


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
    rows: Sequence[Read],
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
                found[block] = by_head(model, at, value).to(model.cfg.device, copy=True)

            return read

        hooks = shifts([rows[row] for row in index.tolist()], batch.input_ids.shape[1])
        hooks += [(hook_name(block, at), reader(block)) for block in blocks]
        logits = last_logits(model, batch, kept, hooks)
        for i, row in enumerate(index.tolist()):
            own = torch.stack([found[block][i, -len(rows[row]) :] for block in blocks])
            receive(row, own, logits[i])

    in_batches(tokens, batch_size, run, progress=False, description="Reading activations")


def require_landing(model: TransformerBridge, at: str, prompt: Read) -> None:
    """Raise ``ModelCheckError`` unless edits at this kind of site change the model's logits.

    Tried once for each model, in its first and its last block.
    """
    if at not in HOOKS:
        raise ValueError(f"at must be one of {', '.join(HOOKS)}; got {at!r}")
    if at in _landed.setdefault(model, set()):
        return
    if HOOKS[at] not in model_report(model).fires:
        raise ModelCheckError(f"{HOOKS[at]} does not fire in every block of this model")
    tokens = padded(model, [prompt])

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


def by_head(model: TransformerBridge, at: str, value: Tensor) -> Tensor:
    """Activations with an axis for the heads where ``at`` is ``z``; others as they are.

    Where values are wider than keys (multi-head latent attention) the bridge cuts heads' outputs
    in pieces of the wrong width. They lie one behind the other all the same.
    """
    return value.flatten(2).unflatten(2, (model.cfg.n_heads, -1)) if at == "z" else value
