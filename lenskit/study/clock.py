"""The clock by which plans, benchmarks and studies measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class _Watch:
    """Seconds by stage; those of an inner stage are not the outer one's too."""

    seconds: dict[str, float] = field(default_factory=dict)
    inner: float = 0.0


_WATCH: ContextVar[_Watch | None] = ContextVar("_WATCH", default=None)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Wall-clock seconds of each ``stage`` inside, filled as the stages end."""
    watch = _Watch()
    token = _WATCH.set(watch)
    try:
        yield watch.seconds
    finally:
        _WATCH.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Counts its seconds to the stage of this name, without those of stages inside it.

    What an accelerator has only queued counts to the stage that waits for it. Does nothing outside
    of ``watched``.
    """
    watch = _WATCH.get()
    if watch is None:
        yield
        return
    outer, watch.inner = watch.inner, 0.0
    start = time.perf_counter()
    try:
        yield
    finally:
        passed = time.perf_counter() - start
        watch.seconds[name] = watch.seconds.get(name, 0.0) + passed - watch.inner
        watch.inner = outer + passed


def seconds_of(run: Callable[[], object], device: torch.device | str | None) -> float:
    """Wall-clock seconds of ``run()``, what it left in an accelerator's queue included."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device | str | None) -> None:
    """Until the device has done all it was given; at once where it has no queue."""
    if torch.device(device or "cpu").type == "cuda":
        torch.cuda.synchronize(device)
