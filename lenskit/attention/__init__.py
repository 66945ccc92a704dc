"""Attention steering: spans, heads, policies of scores and keys, and the context for them."""

from __future__ import annotations

from lenskit.attention.attend import attend, edited
from lenskit.attention.contrast import KeyContrast, fit_key_projections, key_contrast
from lenskit.attention.edit import AttentionEdit
from lenskit.attention.heads import Heads
from lenskit.attention.mass import AttentionMass
from lenskit.attention.policies import (
    HeadBias,
    InstABoost,
    Knockout,
    LogitBias,
    Pasta,
    Policy,
    Spotlight,
    Temperature,
)
from lenskit.attention.projections import KeyProjections
from lenskit.attention.seka import AdaSeka, KeyPolicy, Seka
from lenskit.attention.span import Span, span
from lenskit.attention.view import View

__all__ = [
    "AdaSeka",
    "AttentionEdit",
    "AttentionMass",
    "HeadBias",
    "Heads",
    "InstABoost",
    "KeyContrast",
    "KeyPolicy",
    "KeyProjections",
    "Knockout",
    "LogitBias",
    "Pasta",
    "Policy",
    "Seka",
    "Span",
    "Spotlight",
    "Temperature",
    "View",
    "attend",
    "edited",
    "fit_key_projections",
    "key_contrast",
    "span",
]


def __dir__() -> list[str]:
    return __all__
