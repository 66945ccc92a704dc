"""One thread at a time uses a model, and what a use changes in it is undone whatever happens.

Hooks and replaced modules are seen by every thread that runs the model. So capture, generation
and steering each hold the model's lock as long as they last. A thread may nest them; another one
waits. What a use is about to change it first notes how to undo. The notes are worked off at its
end, and what an interrupt (Ctrl-C in the middle of it) has left of them at the beginning of the
next use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

Undo = Callable[[], object]

_TRIES = 3


@dataclass
class _Uses:
    """A model's lock, and for each use of the thread that holds it the notes it has made."""

    lock: Any = field(default_factory=RLock)
    notes: list[list[Undo]] = field(default_factory=list)


_of_model: WeakKeyDictionary[Any, _Uses] = WeakKeyDictionary()
_making = Lock()


@contextmanager
def using(model: TransformerBridge) -> Iterator[Callable[[Undo], None]]:
    """Hold the model for this thread; yields a function that notes what undoes a change.

    Changes are noted before they are made, and each note may be run more than once and without
    its change. They are run at the end of the context, the last one first. Other threads wait for
    the end of the outermost context; a thread must not wait in it for one of them.
    """
    with _making:
        uses = _of_model.setdefault(model, _Uses())
    # The lock alone knows how many uses are under way: whatever is interrupted, it is released.
    outer = uses.lock._recursion_count()
    with uses.lock:
        _undo(uses.notes, outer)
        own: list[Undo] = []
        uses.notes.append(own)
        try:
            yield own.append
        finally:
            _undo(uses.notes, outer)


def has_hooks(model: TransformerBridge) -> bool:
    """Whether anybody has set hooks on the model, other than its permanent ones."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return any(point.has_hooks(including_permanent=False) for point in points)


@contextmanager
def hooked(
    model: TransformerBridge,
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]],
    *,
    before: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """``model.hooks(fwd_hooks=...)`` under the model's lock, whose hooks are gone afterwards.

    ``before(module, args, kwargs)`` is called at the beginning of every forward pass.
    """
    hooks = [(name, _Hook(function)) for name, function in fwd_hooks]
    with using(model) as note:
        note(partial(setattr, model, "context_level", getattr(model, "context_level", 0)))
        points = model.hook_dict
        for name, hook in hooks:
            if name in points:
                note(partial(_remove, points[name], hook))
        if before is not None:
            whole = model.original_model
            note(partial(_forget, whole._forward_pre_hooks, before))
            note(whole.register_forward_pre_hook(before, with_kwargs=True).remove)
        with model.hooks(fwd_hooks=hooks):
            yield


class _Hook:
    """A hook function that can be told from every other one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, value: Any, hook: Any) -> Any:
        return self.function(value, hook=hook)


def _remove(point: HookPoint, hook: _Hook) -> None:
    # TransformerLens names what it registers after the hook, before it keeps the handle.
    _forget(point._forward_hooks, repr(hook))
    point.fwd_hooks[:] = [handle for handle in point.fwd_hooks if handle.user_hook is not hook]


def _forget(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any] | str) -> None:
    for key, each in list(hooks.items()):
        if each == hook or getattr(each, "__name__", None) == hook:
            hooks.pop(key, None)


def _undo(notes: list[list[Undo]], outer: int) -> None:
    """Work off the notes of all uses but the ``outer`` ones, the last one first.

    What is interrupted is tried again. What remains stays noted for the next use of the model.
    """
    failure: BaseException | None = None
    for of_use in reversed(notes[outer:]):
        for note in reversed(of_use[:]):
            for _ in range(_TRIES):
                try:
                    note()
                    of_use[:] = [other for other in of_use if other is not note]
                    break
                except BaseException as error:
                    failure = error
    notes[outer:] = [of_use for of_use in notes[outer:] if of_use]
    if failure is not None:
        raise failure
