"""Arguments that are numbers: what cannot be meant is refused, and named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any

import numpy as np

__all__ = ["block_numbers", "positive_numbers", "whole"]


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int; raises ValueError for fractions, texts, NaN, and outside the bounds."""
    bounds = f"{least} or more" if most is None else f"from {least} to {most}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, {bounds}; got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


def block_numbers(name: str, blocks: Iterable[int] | None, number: int) -> tuple[int, ...]:
    """Different blocks of a model of ``number``; all for ``None``. Raises ValueError for others."""
    if blocks is None:
        return tuple(range(number))
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Iterable):
        raise ValueError(f"{name} must be a list of block numbers such as [1, 2], got {blocks!r}")
    given = list(blocks)
    if not given:
        raise ValueError(f"{name} is empty; give at least one block, or None for all")
    try:
        chosen = tuple(whole(name, block, 0, number - 1) for block in given)
    except ValueError:
        chosen = ()
    if len(set(chosen)) < len(given):
        raise ValueError(f"{name} must be different numbers from 0 to {number - 1}, got {given}")
    return chosen


def positive_numbers(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """Some finite numbers above zero; raises ValueError for none, for others, and for one alone."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    given = list(values)
    try:
        fine = bool(given) and all(0 < each < math.inf for each in map(float, given))
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{name} must be one or more finite numbers above 0, got {given}")
    return tuple(map(float, given))
