"""Batches of prompts: run one by one, halved when memory runs out, stored while the next runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lenskit._progress import Bars
from lenskit.models.starts import batches
from lenskit.models.templates import Tokens


def in_batches(
    tokens: Tokens,
    batch_size: int,
    run: Callable[[Tensor], None],
    *,
    progress: bool,
    description: str,
) -> None:
    """Call ``run`` with the indices of one batch of prompts after the other, as ``batches`` has it.

    A batch that does not fit into memory is halved, and so are all later ones.
    """
    if batch_size < 1 or batch_size != int(batch_size):
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    waiting = deque(batches(tokens, batch_size))
    with Bars(disable=not progress) as bar:
        task = bar.add_task(description, total=len(tokens))
        while waiting:
            rows = waiting.popleft()
            if _fits(run, rows):
                bar.advance(task, len(rows))
            else:
                remaining = torch.cat([rows, *waiting])
                waiting = deque(remaining.split((len(rows) + 1) // 2))


def _fits(run: Callable[[Tensor], None], rows: Tensor) -> bool:
    try:
        run(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not _out_of_memory(error):
            raise
    else:
        return True
    # Only here is the traceback, which held the batch's tensors, gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate", "not enough memory"))


class Arrivals:
    """Tensors that travel to the CPU while a GPU runs on; one batch is stored during the next."""

    def __init__(self, store: Callable[[Tensor, int, Tensor, Tensor], None]) -> None:
        self._store = store
        self._waiting: deque[tuple[Tensor, dict[int, Tensor], dict[int, Tensor], list]] = deque()
        self._devices: set[torch.device] = set()

    def send(self, tensor: Tensor) -> Tensor:
        """Its copy on the CPU, which from a GPU is filled only later; else the tensor itself."""
        if not tensor.is_cuda:
            return tensor.cpu()
        self._devices.add(tensor.device)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def add(self, rows: Tensor, masses: dict[int, Tensor], states: dict[int, Tensor]) -> None:
        """Keep a batch that has been sent, and store those before it."""
        events = [torch.cuda.current_stream(each).record_event() for each in self._devices]
        self._waiting.append((rows, masses, states, events))
        self.settle(keep=1 if events else 0)

    def settle(self, keep: int = 0) -> None:
        """Store all batches but the last ``keep``."""
        while len(self._waiting) > keep:
            rows, masses, states, events = self._waiting.popleft()
            for event in events:
                event.synchronize()
            for layer, mass in masses.items():
                self._store(rows, layer, mass, states[layer])
