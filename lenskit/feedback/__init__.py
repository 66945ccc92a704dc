"""Closed loops: steering that reads the model while it writes, and acts only where it must."""

from __future__ import annotations

from lenskit.feedback.gains import Gated, gated
from lenskit.feedback.loop import ClosedLoop
from lenskit.feedback.monitors import Monitor, Projection, Reader
from lenskit.feedback.plausible import PlausibleAnswer, generate_plausible
from lenskit.feedback.regulation import LoopRecord, regulate

__all__ = [
    "ClosedLoop",
    "Gated",
    "LoopRecord",
    "Monitor",
    "PlausibleAnswer",
    "Projection",
    "Reader",
    "gated",
    "generate_plausible",
    "regulate",
]


def __dir__() -> list[str]:
    return __all__
