"""What failures are made of: classes with the judge's reasons, and causes that were named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lenskit.figures.experiments.marks import beside, points, rows_named, zero
from lenskit.figures.experiments.tables import need, number_of, of_class
from lenskit.figures.studies import REASONS
from lenskit.figures.style import BLUE, GREY, INK, PALE, new_figure, plain, styled


@styled()
def classes_compared(
    table: pd.DataFrame,
    reasons: pd.DataFrame | None = None,
    predictors: pd.DataFrame | None = None,
    *,
    ways: Sequence[str] | None = None,
    measure: str = "held out",
    coefficient: str = "same divergence",
    title: str = "",
) -> Figure:
    """Each class's score under some ``ways``, why the first of them fails, and what foretells it.

    ``table``, ``reasons`` and ``predictors`` are those of the experiment "classes". ``ways``: by
    default the first two and the prefix in the prompt. Intervals are at 95 %: of scores over
    concepts, of rank correlations by Fisher's transformation. ``coefficient``: at which the reasons
    are. Raises ValueError for tables of something else.
    """
    need(table, ["concept_class", "way", "measure", "mean", "concepts"])
    own = table[table["measure"] == measure]
    there = list(dict.fromkeys(own["way"]))
    if ways is None:
        ways = [*there[:2], *(way for way in there[2:] if way == "prefix in the prompt")]
    own = own[own["way"].isin(ways)]
    if not len(own):
        raise ValueError(f"the table has no {measure!r} of {', '.join(ways)}")
    names = list(dict.fromkeys(own["concept_class"]))
    told = reasons is not None and len(reasons) > 0
    foretold = predictors is not None and len(predictors) > 0
    number = 1 + told + foretold
    figure, panels = new_figure(3.7 * number + 1.0, 2.2 + max(0.55 * len(names), 2.0), 1, number)
    _scores(panels[0], own, names, ways)
    panels[0].set_xlabel(f"{plain(measure)} (95 % interval)")
    rest = iter(panels[1:])
    if reasons is not None and told:
        axes = next(rest)
        part = reasons[(reasons["way"] == ways[0]) & (reasons["coefficient"] == coefficient)]
        _reasons(axes, part, names)
        axes.set_xlabel(f"share of answers at the {coefficient}\n(«{plain(ways[0])}»)")
    if predictors is not None and foretold:
        _predictors(next(rest), predictors)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    shown = own[own["way"] == ways[0]].set_index("concept_class")["mean"]
    figure.alt = f"{measure} by class: " + "; ".join(f"{k} {v:.2f}" for k, v in shown.items())
    return figure


@styled()
def causes_named(
    causes: pd.DataFrame,
    table: pd.DataFrame | None = None,
    *,
    unit: str = "concepts",
    title: str = "",
) -> Figure:
    """How often each cause was named for each fault that was planted; framed: the right one.

    ``causes``: that part of the experiment "failures", or what ``benchmarks.diagnosis`` writes;
    where its ``table`` is given the share named rightly is beside it with its 95 % interval, and n
    in ``unit``.
    """
    need(causes, ["way", "expected", "cause", "share"], "causes")
    faults = list(dict.fromkeys(causes["way"]))
    expected = causes.drop_duplicates("way").set_index("way")["expected"]
    names = list(dict.fromkeys([*expected[faults], *causes["cause"]]))
    shares = causes.pivot_table(index="way", columns="cause", values="share", aggfunc="sum")
    shares = shares.reindex(index=faults, columns=names).fillna(0.0).to_numpy()
    every = None if table is None else of_class(table)
    beside = every is not None and "named rightly" in set(every["measure"])
    figure, panels = new_figure(
        2.6 + 0.62 * len(names) + 2.6 * beside,
        1.9 + 0.4 * len(faults),
        1,
        1 + beside,
        sharey=True,
        width_ratios=[max(2.0, 0.5 * len(names)), *[2.0] * beside],
    )
    panels[0].imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            shade = "white" if share > 0.55 else INK
            panels[0].text(
                column, row, f"{100 * share:.0f}", color=shade, ha="center", va="center", fontsize=8
            )
    for row, fault in enumerate(faults):
        panels[0].add_patch(_frame(names.index(expected[fault]), row))
    panels[0].set_xticks(range(len(names)), [plain(n) for n in names], rotation=40, ha="right")
    rows_named(panels[0], faults)
    counted = "" if every is None else f" (n = {number_of(every)} {unit})"
    panels[0].set_title(f"cause named, %{counted}", fontsize=10)
    if every is not None and beside:
        own = every[every["measure"] == "named rightly"]
        points(panels[1], own, faults, [BLUE] * len(faults), by="way")
        panels[1].set(xlim=(-0.03, 1.03), xlabel="named rightly (95 % interval)")
        panels[1].grid(axis="y", color=PALE, linewidth=0.5)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    right = [f"{f} {100 * shares[i, names.index(expected[f])]:.0f} %" for i, f in enumerate(faults)]
    figure.alt = f"Share named rightly: {'; '.join(right)}"
    return figure


def _frame(column: int, row: int):
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.6, clip_on=False
    )


def _scores(axes: Axes, own: pd.DataFrame, names: Sequence[str], ways: Sequence[str]) -> None:
    for place, way in enumerate(ways):
        rows = own[own["way"] == way].set_index("concept_class").reindex(names)
        mean, low, high = (rows[each].to_numpy(dtype=float) for each in ("mean", "low", "high"))
        beside(axes, mean, low, high, place=place, of=len(ways), spread=0.7, name=way)
    counts = own.groupby("concept_class")["concepts"].max()
    rows_named(axes, [f"{name} (n = {int(counts[name])})" for name in names])
    axes.set_xlim(-0.03, 1.03)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def _reasons(axes: Axes, part: pd.DataFrame, names: Sequence[str]) -> None:
    shares = part.pivot_table(index="concept_class", columns="reason", values="share")
    shares = shares.reindex(names).fillna(0.0)
    order = [*(r for r in REASONS if r in shares), *(r for r in shares if r not in REASONS)]
    left = np.zeros(len(names))
    for reason in order:
        width = shares[reason].to_numpy()
        axes.barh(range(len(names)), width, 0.7, left, color=REASONS.get(reason, GREY))
        left += width
    answers = part.groupby("concept_class")["answers"].max()
    rows_named(axes, [f"n = {int(answers.get(name, 0))}" for name in names])
    axes.set_xlim(0, 1)
    keys = [Patch(color=REASONS.get(reason, GREY)) for reason in order]
    axes.legend(
        keys,
        [plain(r) for r in order],
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.28),
        ncols=2,
    )


def _predictors(axes: Axes, table: pd.DataFrame) -> None:
    need(table, ["measured", "rank correlation", "concepts"], "predictors")
    own = table.dropna(subset=["rank correlation"])
    r = own["rank correlation"].to_numpy(dtype=float).clip(-0.9999, 0.9999)
    n = own["concepts"].to_numpy(dtype=float)
    # Of ranks the variance is 1.06 / (n - 3) (Fieller, Hartley and Pearson, 1957).
    half = 1.96 * np.sqrt(1.06 / np.where(n > 3, n - 3, np.nan))
    rows = own.assign(mean=r, low=np.tanh(np.arctanh(r) - half), high=np.tanh(np.arctanh(r) + half))
    names = list(rows["measured"])
    zero(axes)
    points(axes, rows, names, [BLUE] * len(names), by="measured")
    rows_named(axes, names)
    axes.set_xlim(-1.05, 1.05)
    counted = (
        f"{int(n.min())} to {int(n.max())}"
        if len(n) and n.min() != n.max()
        else f"{n.max():.0f}"
        if len(n)
        else "0"
    )
    axes.set_xlabel(f"rank correlation with the score\n(95 % interval, n = {counted} concepts)")
