"""Where the keys of each head can be read and edited before they are rotated, and whether it lands.

The place is behind the key's projection, and behind its norm where an architecture has one. Some
bridges hand out keys there that nobody uses, or whose scores come about otherwise; so a model is
tried before the first edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.models.active import paused
from lenskit.models.check import probe_tokens
from lenskit.models.edited import NAME, Kept, Site, editing
from lenskit.models.fused import replace_attention, state_of
from lenskit.models.landing import edited_logits, in_half, last_logits, require_landing
from lenskit.models.reference import ModelCheckError
from lenskit.models.templates import Tokens, pad_left
from lenskit.models.use import hooked, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# What comes last before the rotation, first.
_PLACES = {
    "key": ("attn.k_norm.hook_out", "attn.k.hook_out"),
    "query": ("attn.q_norm.hook_out", "attn.q.hook_out"),
}
_FLAT = 3
_known: WeakKeyDictionary[Any, dict[tuple, HeadHooks | str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class HeadHooks:
    """The hooks of all blocks that hold keys (and queries) before the rotation, and their form.

    ``keys`` and ``queries`` name them (no queries: they cannot be read). A head's axis is 1 or 2,
    or 3 where heads lie one behind the other in the last; it may be another one while a block runs
    its own attention (``fused``), where a hook that does not fire has none. ``obstacle``: why
    edited keys must not be generated with by fused attention; empty where they may.
    """

    keys: tuple[str, ...]
    queries: tuple[str, ...]
    kv_heads: int
    heads: int
    d_head: int
    axes: dict[str, int]
    fused: dict[str, int]
    obstacle: str = ""

    def split(self, model: TransformerBridge, name: str, value: Tensor) -> Tensor:
        """A view of what the hook ``name`` is given: ``[row, pos, head, d_head]``."""
        native = model.blocks[0].attn.original_component in editing
        return _split((self.fused if native else self.axes)[name], value, self.d_head)


def head_hooks(model: TransformerBridge) -> HeadHooks:
    """Where the model's keys are edited, tried once for each dtype and device.

    One key of one head is moved, in the first block and in the last: that key's scores alone must
    change, those of the heads that share it, in proportion. Raises ``ModelCheckError`` that says
    what does not hold.
    """
    known, state = _known.setdefault(model, {}), state_of(model)
    if state not in known:
        with using(model), paused(model):
            try:
                known[state] = _try(model)
            except ModelCheckError as error:
                known[state] = str(error)
    found = known[state]
    if isinstance(found, str):
        raise ModelCheckError(f"keys of this model cannot be edited before rotation: {found}")
    return found


def _try(model: TransformerBridge) -> HeadHooks:
    heads, d_head = model.cfg.n_heads, model.cfg.d_head
    kv_heads = getattr(model.cfg, "n_key_value_heads", None) or heads
    if getattr(model.cfg, "qk_norm_after_rope", False):
        raise ModelCheckError("its keys are normalised after the rotation")
    if heads % kv_heads:
        raise ModelCheckError(f"its {heads} heads share {kv_heads} key-value heads unevenly")
    tokens = _probes(model, kv_heads, heads)
    shapes = _shapes(model, tokens)
    numbers = {"key": kv_heads, "query": heads}
    names = {
        kind: tuple(
            next((name for place in places if (name := f"blocks.{block}.{place}") in shapes), "")
            for block in range(model.cfg.n_layers)
        )
        for kind, places in _PLACES.items()
    }
    if "" in names["key"]:
        raise ModelCheckError(
            f"attn.k.hook_out does not fire in block {names['key'].index('')}, which may have no "
            "keys of its own"
        )
    axes = _axes(names, shapes, tokens, numbers, d_head)
    missing = next((name for name in names["key"] if name not in axes), None)
    if missing is not None:
        raise ModelCheckError(
            f"{missing} holds {shapes[missing]}, not {kv_heads} heads of {d_head} entries a token"
        )
    queries = names["query"] if all(name in axes for name in names["query"]) else ()
    hooks = HeadHooks(names["key"], queries, kv_heads, heads, d_head, axes, {})
    for block in sorted({0, model.cfg.n_layers - 1}):
        require_landing(model, hooks, block, tokens)
    try:
        return _with_fused(model, hooks, names, tokens, numbers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever goes wrong in a model that nobody has foreseen, eager attention remains.
        return _eager_alone(hooks, str(error) or type(error).__name__)


def _with_fused(
    model: TransformerBridge,
    hooks: HeadHooks,
    names: dict[str, tuple[str, ...]],
    tokens: Tokens,
    numbers: dict[str, int],
) -> HeadHooks:
    """The same, and how keys lie in fused attention, where the edited logits must be equal."""
    eager = edited_logits(model, hooks, tokens)
    sites = [Site(block, [], Kept()) for block in range(model.cfg.n_layers)]
    with using(model) as note:
        replace_attention(model, NAME, editing, sites, note)
        shapes = _shapes(model, tokens)
        axes = _axes(names, shapes, tokens, numbers, hooks.d_head)
        for name in hooks.keys:
            if name not in axes:
                return _eager_alone(hooks, f"{name} would not fire")
        hooks = HeadHooks(**{**vars(hooks), "fused": axes})
        difference = (edited_logits(model, hooks, tokens) - eager).abs().max() / eager.abs().max()
    if not difference <= (0.1 if in_half(model) else 1e-4):
        return _eager_alone(hooks, f"edited logits differ from eager ones by {difference:.1g}")
    return hooks


def _eager_alone(hooks: HeadHooks, why: str) -> HeadHooks:
    return HeadHooks(**{**vars(hooks), "fused": {}, "obstacle": f"keys are edited, and {why}"})


def _probes(model: TransformerBridge, *numbers: int) -> Tokens:
    """Two prompts of different lengths, padded to a length that is no number of heads."""
    tokens = probe_tokens(model.tokenizer)
    rows = zip(tokens.input_ids, tokens.attention_mask.bool(), strict=True)
    ids = [row[real].tolist() for row, real in rows]
    while (width := max(map(len, ids))) in numbers:
        ids = [[*each, each[-1]] if len(each) == width else each for each in ids]
    padding = 0 if model.tokenizer is None else model.tokenizer.pad_token_id
    return pad_left(ids, padding).to(model.cfg.device)


def _shapes(model: TransformerBridge, tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """Of each hook that could serve and fires, the shape of what it holds."""
    shapes: dict[str, tuple[int, ...]] = {}

    def read(value: Tensor, hook: Any, name: str) -> None:
        shapes[name] = tuple(value.shape)

    known = model.hook_dict
    names = [
        name
        for block in range(model.cfg.n_layers)
        for places in _PLACES.values()
        for place in places
        if (name := f"blocks.{block}.{place}") in known
    ]
    with hooked(model, [(name, partial(read, name=name)) for name in names]):
        last_logits(model, tokens)
    return shapes


def _axes(
    names: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    tokens: Tokens,
    numbers: dict[str, int],
    d_head: int,
) -> dict[str, int]:
    """The axis of the heads of each hook that holds one vector for each head and token."""
    rows, length = tokens.input_ids.shape
    axes: dict[str, int] = {}
    for kind, own in names.items():
        number = numbers[kind]
        forms = {
            (rows, number, length, d_head): 1,
            (rows, length, number, d_head): 2,
            (rows, length, number * d_head): _FLAT,
        }
        axes |= {name: forms[shapes[name]] for name in own if shapes.get(name) in forms}
    return axes


def _split(axis: int, value: Tensor, d_head: int) -> Float[Tensor, "row pos head d_head"]:
    if axis == _FLAT:
        return value.view(*value.shape[:-1], -1, d_head)
    return value.transpose(1, 2) if axis == 1 else value
