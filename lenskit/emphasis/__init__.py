"""Emphasis compared: attention steering against prompts, and against the rest of the field."""

from __future__ import annotations

from lenskit.emphasis.emphasis import Sizes, emphasis
from lenskit.emphasis.learnt import learn_head_bias

__all__ = ["Sizes", "emphasis", "learn_head_bias"]


def __dir__() -> list[str]:
    return __all__
