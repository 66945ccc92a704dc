"""Ways to steer side by side: scores, paired differences, and what else was measured."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lenskit.figures.experiments.marks import DIFFERENCE, bars, points, rows_named, zero
from lenskit.figures.experiments.tables import controls, measured, need, number_of, of_class
from lenskit.figures.style import BLUE, GREY, PALE, SKY, new_figure, plain, styled

SCORES = ("best", "held out")


@styled()
def ways_compared(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = SCORES,
    beside: Sequence[str] = (),
    ways: Sequence[str] | None = None,
    concept_class: str = "all",
    by: str = "way",
    unit: str = "concepts",
    title: str = "",
) -> Figure:
    """Bars of one or two ``measures`` and, in panels beside them, the paired difference of the last
    one to the reference and the measures ``beside``; all with their 95 % intervals.

    ``table``: that of an ``Experiment``. ``ways``: some of them, by default all; controls come last
    and are grey. A difference whose interval holds 0 is hollow. Measures that the table has not are
    left out. ``unit``: what n counts. Raises ValueError for a table without ``measures``, for a
    class or a way that is not in it.
    """
    need(table, [by])
    own = of_class(table, concept_class)
    shown = measured(own, measures)[-2:]
    if not shown:
        raise ValueError(f"the table has none of the measures {', '.join(measures)}")
    grey = controls(own, by)
    there = list(dict.fromkeys(own[by]))
    if ways is not None and (unknown := [way for way in ways if way not in there]):
        raise ValueError(f"{unknown[0]!r} is not among the {by}s of the table: {', '.join(there)}")
    chosen = there if ways is None else list(ways)
    order = [*(way for way in chosen if way not in grey), *(way for way in chosen if way in grey)]
    further = measured(own, beside)
    main = own[own["measure"] == shown[-1]]
    reference = _reference(main)
    compared = reference is not None and main["difference"].notna().sum() > 1
    columns = 1 + compared + len(further)
    widest = max(len(str(way)) for way in order)
    sizes = [2.0, *[1.2] * (columns - 1)]
    figure, panels = new_figure(
        1.0 + 0.072 * widest + 1.75 * sum(sizes),
        1.5 + 0.3 * len(order) * (1.25 if len(shown) > 1 else 1),
        1,
        columns,
        sharey=True,
        width_ratios=sizes,
    )
    colours = [GREY if way in grey else BLUE for way in order]
    _bars(panels[0], own, shown, order, colours, by)
    rows_named(panels[0], order)
    said = concept_class if concept_class != "all" else ""
    panels[0].set_xlabel(
        f"mean, 95 % interval (n = {number_of(main)} {said} {unit})".replace("  ", " ")
    )
    rest = iter(panels[1:])
    if compared:
        axes = next(rest)
        zero(axes)
        points(axes, main, order, colours, by=by, names=DIFFERENCE, skipped=[str(reference)])
        axes.set_title(f"{shown[-1]}, paired difference", fontsize=9.5)
        axes.set_xlabel(
            f"to «{plain(str(reference))}»" if reference else "to each one's own", fontsize=9
        )
    for axes, measure in zip(rest, further, strict=True):
        points(axes, own[own["measure"] == measure], order, colours, by=by)
        axes.set_title(plain(measure), fontsize=9.5)
    for axes in panels[1:]:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
    _key(figure, shown, bool(set(order) & set(grey)))
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = _alt(main, order, by, shown[-1], unit)
    return figure


def _bars(
    axes: Axes,
    own: pd.DataFrame,
    shown: Sequence[str],
    order: Sequence[str],
    colours: Sequence[str],
    by: str,
) -> None:
    pale = [PALE if colour == GREY else SKY for colour in colours]
    looks = (
        [(colours, 0.0, 0.62)] if len(shown) == 1 else [(pale, -0.2, 0.36), (colours, 0.2, 0.36)]
    )
    for measure, (shades, shift, height) in zip(shown, looks, strict=True):
        rows = own[own["measure"] == measure]
        bars(axes, rows, order, shades, by=by, shift=shift, height=height)
    low, high = axes.get_xlim()
    # What is written behind the longest bar needs room.
    axes.set_xlim(min(0.0, low), high + 0.14 * (high - min(0.0, low)))


def _key(figure: Figure, shown: Sequence[str], grey: bool) -> None:
    colours = {"": (SKY, BLUE), "control: ": (PALE, GREY)} if grey else {"": (SKY, BLUE)}
    keys = {
        f"{kind}{plain(measure)}": Patch(color=colour)
        for kind, pair in colours.items()
        for measure, colour in zip(shown, pair[-len(shown) :], strict=True)
    }
    figure.legend(list(keys.values()), list(keys), loc="outside lower left", ncols=4, fontsize=8.5)


def _reference(main: pd.DataFrame) -> str | None:
    """What all are compared to, "" where each has its own, ``None`` where there is none."""
    if "difference" not in main or "reference" not in main:
        return None
    named = [name for name in dict.fromkeys(main["reference"].fillna("").astype(str)) if name]
    return None if not named else named[0] if len(named) == 1 else ""


def _alt(main: pd.DataFrame, order: Sequence[str], by: str, measure: str, unit: str) -> str:
    means = main.set_index(by)["mean"].to_dict()
    said = [
        f"{way} {means[way]:.2f}" for way in order if means.get(way, float("nan")) == means.get(way)
    ]
    return f"{measure} of {len(order)} ways, mean over {number_of(main)} {unit}: {'; '.join(said)}"
