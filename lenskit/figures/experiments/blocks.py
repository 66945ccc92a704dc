"""Which blocks: the curve over their number, the scores that choose them, and depth over sizes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lenskit.figures.experiments.marks import doubling, level, lines, points, rows_named, zero
from lenskit.figures.experiments.tables import measured, need, number_of, of_class, rows_of
from lenskit.figures.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    new_figure,
    plain,
    styled,
)

_PLACED = {
    "top by enrichment": BLUE,
    "bottom by enrichment": ORANGE,
    "random": GREEN,
    "early": PURPLE,
    "middle": "#56B4E9",
    "late": "#262626",
}


@styled()
def blocks_by_number(
    table: pd.DataFrame,
    ranking: pd.DataFrame | None = None,
    *,
    measure: str = "held out",
    concept_class: str = "all",
    title: str = "",
) -> Figure:
    """Steering k blocks: the most and least enriched, random ones, the early, middle and late; the
    best k by other scores; and how well each score orders the blocks as steering each alone does.

    All with 95 % intervals over concepts; dashed: all blocks. ``table`` and ``ranking`` are the
    table and the part of that name of the experiment "blocks"; ValueError for another one.
    """
    need(table, ["way", "chosen by", "k"])
    own = rows_of(table, measure, concept_class)
    everything = own[own["chosen by"] == "all"]
    placed = {name: own[own["chosen by"] == name] for name in _PLACED}
    chosen = [name for name in dict.fromkeys(own["chosen by"]) if str(name).startswith("top by")]
    scores = {name.removeprefix("top by "): own[own["chosen by"] == name] for name in chosen}
    sizes = sorted(set(own.loc[own["chosen by"].isin([*_PLACED, *chosen]), "k"].dropna()))
    if not sizes:
        raise ValueError("the table has no way that steers some of the blocks; give that of blocks")
    number = 2 + (ranking is not None and len(ranking) > 0)
    figure, panels = new_figure(3.5 * number + 0.6, 4.6, 1, number)
    panels[1].sharey(panels[0])  # before anything is drawn: both then show all of it
    parts = (
        ({name: rows for name, rows in placed.items() if len(rows)}, _PLACED, "chosen how"),
        (scores, None, "top k by which score"),
    )
    for axes, (series, colours, name) in zip(panels, parts, strict=False):
        keys = lines(axes, series, "k", colours=colours)
        if len(everything):
            keys["all blocks"] = level(axes, float(everything["mean"].iloc[0]), "all blocks")
        doubling(axes, sizes)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"steered blocks k (n = {number_of(own)} concepts)")
        axes.legend(
            list(keys.values()),
            [plain(key) for key in keys],
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=2,
        )
    panels[0].set_ylabel(f"{plain(measure)} (mean, 95 % interval)")
    if ranking is not None and len(ranking):
        rows = of_class(ranking, concept_class)
        names = list(dict.fromkeys(rows["way"]))
        zero(panels[-1])
        points(panels[-1], rows, names, [BLUE] * len(names), by="way")
        rows_named(panels[-1], names)
        panels[-1].set_title("orders blocks as steering does", fontsize=10)
        panels[-1].set_xlabel(f"rank correlation (n = {number_of(rows)})")
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = f"{measure} when k blocks are steered, k = {', '.join(f'{k:g}' for k in sizes)}"
    return figure


@styled()
def depth_by_size(
    table: pd.DataFrame,
    summary: pd.DataFrame | None = None,
    *,
    concept_class: str = "all",
    title: str = "",
) -> Figure:
    """Each measure over relative depth, a line for each model, and the models' own figures.

    ``table`` is the part "by block" of the experiment "sizes" and ``summary`` its table; 95 %
    intervals over concepts. Of more than eight models the lines go from light to dark.
    """
    need(table, ["model", "relative depth", "measure", "mean"])
    own = of_class(table, concept_class)
    models = list(dict.fromkeys(own["model"]))
    names = list(dict.fromkeys(own["measure"]))
    colours = model_colours(models)
    further = {} if summary is None else _halves(of_class(summary)["measure"])
    number = len(names) + len(further)
    columns = min(3, number)
    rows = -(-number // columns)
    figure, panels = new_figure(1.9 + 3.1 * columns, 0.5 + 2.75 * rows, rows, columns)
    keys: dict = {}
    for axes, name in zip(panels, names, strict=False):
        part = own[own["measure"] == name]
        series = {model: part[part["model"] == model] for model in models}
        keys = lines(axes, series, "relative depth", dodge=False, colours=colours)
        axes.set_title(plain(name), fontsize=9.5)
        axes.set(xlim=(-0.03, 1.03))
    for axes, (said, part) in zip(panels[len(names) :], further.items(), strict=False):
        _figures(axes, of_class(summary, concept_class), models, part)
        axes.set_title(said, fontsize=9.5)
    for axes in panels[number:]:
        axes.set_axis_off()
    figure.supxlabel(
        f"relative depth, first block 0 and last 1 (mean, 95 % interval, n = {number_of(own)} "
        "concepts)",
        fontsize=10,
    )
    figure.legend(
        list(keys.values()), [plain(name) for name in keys], loc="outside right upper", fontsize=9
    )
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = f"{', '.join(names)} by relative depth of {', '.join(models)}"
    return figure


def model_colours(models: list[str]) -> dict[str, str]:
    """A colour each; a scale from light to dark where there are more than tell apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if len(models) <= len(COLOURS):
        return dict(zip(models, COLOURS, strict=False))
    shades = np.linspace(0.92, 0.0, len(models))
    return {
        name: to_hex(colormaps["cividis"](shade))
        for name, shade in zip(models, shades, strict=True)
    }


def _halves(measures: Iterable[str]) -> dict[str, list[str]]:
    """The figures of whole models: those of answers, and those of attention and depth."""
    found: dict[str, list[str]] = {"answers": [], "attention and depth": []}
    for name in dict.fromkeys(measures):
        inner = name.startswith(("gat", "depth"))
        found["attention and depth" if inner else "answers"].append(name)
    return {said: names for said, names in found.items() if names}


def _figures(axes, summary: pd.DataFrame, models: list[str], names: list[str]) -> None:
    """What each model shows as a whole, over the models in their order."""
    place = {model: i for i, model in enumerate(models)}
    shown = summary[summary["way"].isin(models)]
    series = {
        name: part.assign(place=part["way"].map(place))
        for name, part in shown.groupby("measure", sort=False)
        if name in measured(shown, names)
    }
    keys = lines(axes, series, "place", dodge=False)
    axes.set_xticks(range(len(models)), [plain(name) for name in models], rotation=90, fontsize=7)
    below = -0.12 - 0.026 * max(map(len, models))  # under the models' names
    axes.legend(
        list(keys.values()),
        [plain(name) for name in keys],
        **{"loc": "upper center", "bbox_to_anchor": (0.5, below), "ncols": 2, "fontsize": 7},
    )
    axes.axhline(0, color=GREY, linewidth=0.6)
