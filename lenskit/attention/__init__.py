"""Attention steering: spans, heads, policies, and the context that applies them."""

from __future__ import annotations

from lenskit.attention.attend import attend, edited
from lenskit.attention.edit import AttentionEdit
from lenskit.attention.heads import Heads
from lenskit.attention.mass import AttentionMass
from lenskit.attention.policies import (
    InstABoost,
    Knockout,
    LogitBias,
    Pasta,
    Policy,
    Spotlight,
    Temperature,
)
from lenskit.attention.span import Span, span
from lenskit.attention.view import View

__all__ = [
    "AttentionEdit",
    "AttentionMass",
    "Heads",
    "InstABoost",
    "Knockout",
    "LogitBias",
    "Pasta",
    "Policy",
    "Span",
    "Spotlight",
    "Temperature",
    "View",
    "attend",
    "edited",
    "span",
]


def __dir__() -> list[str]:
    return __all__
