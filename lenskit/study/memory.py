"""How much memory a computation needs at its worst."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors and arrays made by ``run()`` hold at one time, beside its inputs.

    Tensors and NumPy's arrays are counted apart and added, so that it may be somewhat too much. It
    runs slower meanwhile: measure seconds apart.
    """
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        with _Live() as live:
            run()
        return live.peak + max(0, tracemalloc.get_traced_memory()[1] - before)
    finally:
        if ours:
            tracemalloc.stop()


class _Live(TorchDispatchMode):
    """Counts the storages that operations make, until nobody holds them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in _tensors((args, kwargs)):
            self._note(given, 0)
        found = func(*args, **kwargs)
        for made in _tensors(found):
            self._note(made, made.untyped_storage().nbytes())
        return found

    def _note(self, tensor: Tensor, size: int) -> None:
        """Count a storage that is seen for the first time, as long as it lives."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among what an operation takes or gives."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
