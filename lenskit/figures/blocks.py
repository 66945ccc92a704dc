"""Lines over the blocks of a model, for any number that each block has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lenskit.figures.style import COLOURS, GREY, MARKERS, end_labels, panel, plain, styled
from lenskit.scoring import mean_interval


@styled()
def by_block(
    values: Mapping[str, Float[Tensor, "block"] | Float[Tensor, "row block"]],
    *,
    label: str,
    chance: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A line over the blocks for each name, and ``label`` says what the values are.

    Of several rows (of concepts, say) the mean is shown, with its 95 % bootstrap interval as a
    band; NaN is left out. ``chance``: a dashed line. Raises ``ValueError`` where names differ in
    their number of blocks, or there are none.
    """
    tables = {name: np.atleast_2d(given.double().cpu().numpy()) for name, given in values.items()}
    if len({table.shape[1:] for table in tables.values()}) != 1:
        shapes = {name: list(given.shape) for name, given in values.items()}
        raise ValueError(f"values must be [block] or [row, block] of as many blocks; got {shapes}")
    number = sorted({len(table) for table in tables.values()})
    blocks = np.arange(next(iter(tables.values())).shape[1])
    alt = f"{label}, by block (0 to {len(blocks) - 1}) for {', '.join(tables)}"
    figure, axes = panel(ax, 7.0, 3.7, alt)
    ends: dict[str, tuple[float, Any]] = {}
    for place, (name, table) in enumerate(tables.items()):
        colour, mark = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        columns = [column[np.isfinite(column)] for column in table.T]
        mean = np.array([column.mean() if len(column) else np.nan for column in columns])
        axes.plot(blocks, mean, color=colour, marker=mark, markersize=5)
        if len(table) > 1:
            low, high = np.array([mean_interval(column, draws=2000) for column in columns]).T
            axes.fill_between(blocks, low, high, color=colour, alpha=0.18, lw=0)
        if (known := mean[np.isfinite(mean)]).size:
            ends[name] = (float(known[-1]), colour)
    if chance is not None:
        axes.axhline(chance, color=GREY, linestyle="--", linewidth=1.2)
        ends["chance"] = (chance, GREY)
    counted = f" (n = {' to '.join(map(str, number))}: mean, 95 % interval)"
    below = f"block{counted if number[-1] > 1 else ''}"
    axes.set(xticks=blocks, xlabel=below, ylabel=plain(label), title=plain(title))
    end_labels(axes, ends)
    return figure
