"""How sure a mean is: its bootstrap interval."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# Draws that are held at once, since a table of thousands of prompts has as many columns.
_HELD = 2**22


def mean_interval(
    values: Float[np.ndarray, " value"], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Ends of the interval of a mean at ``level``: percentiles of ``draws`` bootstrap samples.

    NaN where there are fewer than two values. Raises ValueError for a level or draws out of range.
    """
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level must be in (0, 1) and draws 1 or more, got {level} and {draws}")
    number = len(values)
    if number < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    rows = max(1, _HELD // number)
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    means = [values[random.integers(number, size=(size, number))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
