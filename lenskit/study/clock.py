"""The clock by which plans and benchmarks measure."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


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
