"""Edits that are applied to every forward pass of a model inside a context, row by row.

Steering and edits of attention are such edits. A generation loop that reorders rows or drops those
that have ended tells each edit so, and every row keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit.models.kv_cache import cache_of
from lenskit.models.templates import position_ids
from lenskit.models.use import hooked, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Edit(Protocol):
    """What a model does differently in every forward pass inside a context.

    ``number``: for how many rows it was made; ``None`` serves a batch of any size. ``what`` names
    it in messages. One that fused attention cannot carry says why in ``obstacle``.
    """

    what: str

    @property
    def number(self) -> int | None: ...

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which of its rows the next batches hold; ``None``: all of them."""

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at the tokens of the coming pass; raises where they are not those of the edit."""

    def hooks(self) -> list[tuple[str, Any]]:
        """Hook names and functions, as ``model.hooks(fwd_hooks=...)`` takes them."""


@contextmanager
def applied(model: TransformerBridge, edit: Edit) -> Iterator[None]:
    """Apply an edit to every forward pass inside the context, after those applied already."""

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if model not in _paused:
            edit.before_forward(module, args, kwargs)

    def unless_paused(function: Any) -> Any:
        def call(value: Tensor, hook: Any) -> Tensor:
            return value if model in _paused else function(value, hook=hook)

        return EditHook(call)

    with using(model) as note:
        stack = _active.setdefault(model, [])
        note(partial(_leave, stack, edit))
        stack.append(edit)
        hooks = [(name, unless_paused(function)) for name, function in edit.hooks()]
        with hooked(model, hooks, before=before):
            yield


@contextmanager
def paused(model: TransformerBridge) -> Iterator[None]:
    """Without the edits that are applied to the model."""
    with using(model) as note:
        if model not in _paused:
            note(partial(_paused.discard, model))
            _paused.add(model)
        yield


@contextmanager
def unwatched(model: TransformerBridge) -> Iterator[None]:
    """Without the hooks that are no edit's: what runs inside is seen by nobody else."""
    with using(model) as note:
        for point in {id(each): each for each in model.hook_dict.values()}.values():
            foreign = {
                handle.hook.id
                for handle in (*point.fwd_hooks, *point.bwd_hooks)
                if not is_edit(handle)
            }
            for hooks in (point._forward_hooks, point._backward_hooks) if foreign else ():
                own = dict(hooks)
                note(partial(_restore, hooks, own))
                _restore(hooks, {key: hook for key, hook in own.items() if key not in foreign})
        yield


def is_edit(handle: Any) -> bool:
    """Whether a hook of TransformerLens belongs to an edit."""
    hook = getattr(handle, "user_hook", None)
    return isinstance(getattr(hook, "function", hook), EditHook)


@dataclass(frozen=True)
class EditHook:
    """A hook that belongs to an edit, so that it can be told from those of others."""

    function: Callable[..., Tensor]

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        return self.function(value, hook=hook)


def applied_edits(model: TransformerBridge) -> tuple[Any, ...]:
    """The edits now applied to the model, the outermost first."""
    return tuple(_active.get(model, ()))


@contextmanager
def rows_of(model: TransformerBridge, number: int, what: str) -> Iterator[Sequence[Edit]]:
    """The model's edits, each given back its own order of rows afterwards.

    Raises ``ValueError`` for one that was made for another number of rows than ``number``;
    ``what`` names these in the message.
    """
    with using(model) as note:
        edits = applied_edits(model)
        for each in edits:
            if each.number not in (None, number):
                raise ValueError(
                    f"{each.what} for {each.number} rows, but there are {number} {what}; give "
                    "one for each, or one for all"
                )
            note(partial(each.batch, None))
        yield edits


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward pass, which may follow others that are in the cache.

    ``ids`` and ``mask`` (1 on real tokens) are those of the pass and of all keys; ``ids`` is
    ``None`` where the pass is given embeddings.
    """

    ids: Int[Tensor, "row pos"] | None
    rows: int
    length: int
    real: Bool[Tensor, "row key"]

    @property
    def positions(self) -> Int[Tensor, "row key"]:
        """Positions of all keys, counted in the row's own tokens; -1 on padding."""
        return position_ids(self.real).masked_fill(~self.real, -1)

    @property
    def earlier(self) -> int:
        """How many keys are in the cache, padding among them."""
        return self.real.shape[1] - self.length

    def follows(self, before: Chunk | None) -> bool:
        """Whether this pass, without a cache, is the one before and a token more in every row."""
        if before is None or self.ids is None or before.ids is None or self.earlier:
            return False
        known, ids = before.ids, self.ids[:, :-1]
        if known.shape != ids.shape or known.device != ids.device:
            return False
        return torch.equal(known, ids) and torch.equal(before.real, self.real[:, :-1])

    @property
    def last(self) -> Int[Tensor, "row"]:
        """Where in this pass each row's last real token stands; the last column in an empty row."""
        behind = self.real[:, -self.length :].flip(1).int().argmax(dim=1)
        return self.length - 1 - behind


def chunk_of(args: tuple, kwargs: dict[str, Any]) -> Chunk:
    """The tokens of a forward pass from what the model is called with.

    Raises ``ValueError`` for a mask from which padding cannot be told.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if ids is None else ids
    rows, length = tokens.shape[:2]
    mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return Chunk(ids, rows, length, mask.bool())
    if mask is not None:
        raise ValueError(
            "the model is given an attention_mask that is not [row, pos], from which the padding "
            "cannot be told; give the mask of the tokens, 1 on real ones"
        )
    past = 0 if cache is None else cache.get_seq_length()
    return Chunk(
        ids, rows, length, torch.ones(rows, past + length, dtype=torch.bool, device=tokens.device)
    )


def require_rows(edit: Edit, rows: int, given: int) -> None:
    """Raise ``ValueError`` where a pass of ``given`` rows meets an edit that now has ``rows``."""
    if edit.number is not None and rows != given:
        raise ValueError(
            f"{edit.what} for {rows} rows, but the batch has {given}; give one for each row "
            "(beam search, which copies rows, needs one for all)"
        )


def _restore(hooks: dict[int, Any], own: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(own)


def _leave(stack: list[Any], edit: Any) -> None:
    stack[:] = [each for each in stack if each is not edit]


_active: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
_paused: WeakSet[Any] = WeakSet()
