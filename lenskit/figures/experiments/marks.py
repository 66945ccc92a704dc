"""Marks that the pictures of experiments share: bars, points and lines with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from lenskit.figures.experiments.tables import columns_of, errors
from lenskit.figures.style import COLOURS, GREY, INK, MARKERS, PALE, plain

ENDS = ("mean", "low", "high")
DIFFERENCE = ("difference", "difference_low", "difference_high")
_LOOK = {"linestyle": "none", "elinewidth": 1.2, "markersize": 5.5, "capsize": 0}


def bars(
    axes: Axes,
    own: pd.DataFrame,
    ways: Sequence[str],
    colours: Sequence[str],
    *,
    by: str,
    shift: float,
    height: float,
) -> None:
    """Horizontal bars of a measure with its intervals, and the mean in figures behind them."""
    mean, low, high = columns_of(own, ENDS, ways, by)
    place = np.arange(len(ways)) + shift
    arms = errors(mean, low, high)
    axes.barh(
        place,
        np.nan_to_num(mean),
        height,
        xerr=arms,
        color=list(colours),
        error_kw={"ecolor": INK, "elinewidth": 1},
    )
    for y, value, arm in zip(place, mean, arms[1], strict=True):
        if value == value:
            axes.annotate(
                f"{value:.2f}",
                (value + arm, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )


def beside(
    axes: Axes,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    place: int,
    of: int,
    spread: float,
    name: str,
) -> None:
    """Points with intervals in every row, number ``place`` of ``of`` that share its ``spread``."""
    rows = np.arange(len(mean)) + spread / of * (place + 0.5) - spread / 2
    axes.errorbar(
        mean,
        rows,
        xerr=errors(mean, low, high),
        fmt=MARKERS[place % len(MARKERS)],
        color=COLOURS[place % len(COLOURS)],
        markersize=5,
        elinewidth=1.2,
        label=plain(name),
    )


def points(
    axes: Axes,
    own: pd.DataFrame,
    ways: Sequence[str],
    colours: Sequence[str],
    *,
    by: str,
    names: Sequence[str] = ENDS,
    skipped: Sequence[str] = (),
) -> None:
    """A point for each way with its interval; hollow where the interval holds 0 or is missing."""
    mean, low, high = columns_of(own, names, ways, by)
    arms = errors(mean, low, high)
    for place, (way, colour) in enumerate(zip(ways, colours, strict=True)):
        if way in skipped or mean[place] != mean[place]:
            continue
        unsure = names == DIFFERENCE and not (low[place] > 0 or high[place] < 0)
        axes.errorbar(
            mean[place],
            place,
            xerr=arms[:, place, None],
            fmt="o",
            color=colour,
            mfc="white" if unsure else colour,
            **_LOOK,
        )


def lines(
    axes: Axes,
    series: Mapping[str, pd.DataFrame],
    x: str,
    *,
    names: Sequence[str] = ENDS,
    dodge: bool = True,
    colours: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A line with intervals for each name, over the column ``x`` (above 0, doubling mostly).

    Points of several lines stand side by side, so that each interval can be seen. Returns the
    keys of a legend.
    """
    keys: dict[str, Any] = {}
    for place, (name, own) in enumerate(series.items()):
        rows = own.dropna(subset=[x, names[0]]).sort_values(x)
        colour = (colours or {}).get(name, COLOURS[place % len(COLOURS)])
        spread = 1.035 ** (place - (len(series) - 1) / 2) if dodge else 1.0
        mean, low, high = (rows[each].to_numpy(dtype=float) for each in names)
        keys[name] = axes.errorbar(
            rows[x].to_numpy(dtype=float) * spread,
            mean,
            errors(mean, low, high),
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.3,
            elinewidth=1,
        )
    return keys


def doubling(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each of these values that has room for its figures."""
    axes.set_xscale("log")
    own = sorted(set(values))
    apart: list[float] = []
    for value in own:
        if not apart or value > 1.4 * apart[-1]:
            apart.append(value)
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(apart, [f"{value:g}" for value in apart])
    # A single value would have no width.
    axes.set_xlim(own[0] / 1.25, own[-1] * 1.25)


def one_two_five(axes: Axes) -> None:
    """A logarithmic axis with ticks at 1, 2, 5, 10 …, in figures."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def level(axes: Axes, value: float, name: str, style: str = "--") -> Any:
    """A grey line at a control's score."""
    return axes.axhline(value, color=GREY, linestyle=style, linewidth=1.2, label=plain(name))


def zero(axes: Axes, *, upright: bool = True) -> None:
    """A line at no difference."""
    (axes.axvline if upright else axes.axhline)(0, color=PALE, linewidth=1.2, zorder=0)


def rows_named(axes: Axes, ways: Sequence[str]) -> None:
    """The ways from above, by name."""
    axes.set_yticks(range(len(ways)), [plain(str(way)) for way in ways])
    axes.set_ylim(len(ways) - 0.4, -0.6)
