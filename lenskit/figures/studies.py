"""Pictures of a study's scores: by variant, by class, by coefficient, by steered blocks."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lenskit.figures.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PALE,
    RED,
    SKY,
    YELLOW,
    legend,
    new_figure,
    panel,
    plain,
    styled,
)

REASONS = MappingProxyType(
    {
        "on concept": BLUE,
        "missing a concept": GREEN,
        "neutral": PALE,
        "off concept": SKY,
        "ill formed": YELLOW,
        "unfinished": ORANGE,
        "repeating": RED,
    }
)
SCORES = MappingProxyType({"best": "best coefficient per question", "held_out": "held out"})
_MEASURES = {*SCORES, *(f"{score} ±" for score in SCORES), "concepts", "concept_class"}
_WORDS = {
    ("token", "attention"): "attention-guided token",
    ("token", "each"): "each closing token its own",
    ("learner", "rfm"): "RFM",
    ("learner", "pca"): "PCA",
    ("blocks", "all"): "all blocks",
}
_FORMS = {"token": "token {}", "labels": "{} labels", "blocks": "blocks {}"}


def row_names(table: pd.DataFrame) -> list[str]:
    """What the rows of ``Study.compare`` differ in, in words; a control by its name alone."""
    control = _controls(table)
    keys = [column for column in table if column not in _MEASURES]
    varied = [key for key in keys if table.loc[~control, key].nunique() > 1] or keys[:1]
    return [
        row["control"] if grey else ", ".join(_word(key, row[key]) for key in varied if row[key])
        for row, grey in zip(table.to_dict("records"), control, strict=True)
    ]


@styled()
def steerability_bars(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Figure:
    """Both scores with their standard errors: two bars for each row of ``Study.compare``.

    Rows are named by the columns in which they differ; controls are grey.
    """
    names, control = row_names(table), _controls(table)
    longest = max(len(name) for name in names)
    alt = f"Steerability of {len(table)} ways of steering: {_in_words(names, table)}"
    figure, axes = panel(ax, 5.6 + 0.075 * longest, 1.4 + 0.46 * len(table), alt)
    place = np.arange(len(table))
    for score, shift, colours in (("best", -0.2, (SKY, PALE)), ("held_out", 0.2, (BLUE, GREY))):
        mean, error = _percent(table, score)
        shades = [colours[int(grey)] for grey in control]
        bars = {"ecolor": INK, "elinewidth": 1}
        axes.barh(place + shift, mean, 0.38, xerr=error, color=shades, error_kw=bars)
        for y, value, half in zip(place + shift, mean, error, strict=True):
            axes.text(value + half + 1.2, y, f"{value:.0f}", va="center", fontsize=8.5)
    axes.set_yticks(place, [plain(name) for name in names])
    axes.set(ylim=(len(table) - 0.45, -0.55), xlim=(0, 106), xticks=range(0, 101, 20))
    number = _number(table)
    axes.set_xlabel(f"steerability, % of questions ± standard error, n = {number} concepts")
    axes.set_title(plain(title))
    colours = {"": (SKY, BLUE)} | ({"control: ": (PALE, GREY)} if control.any() else {})
    keys = {
        f"{kind}{words}": Patch(color=colour)
        for kind, pair in colours.items()
        for words, colour in zip(SCORES.values(), pair, strict=True)
    }
    where = {"loc": "outside lower right"} if ax is None else {"loc": "lower right"}
    owner = figure if ax is None else axes
    owner.legend(list(keys.values()), list(keys), ncols=2, fontsize=9, **where)
    return figure


@styled()
def steerability_by_class(
    table: pd.DataFrame, *, title: str = "", ax: Axes | None = None
) -> Figure:
    """Both scores of each class: ``table`` is ``Study.compare(["concept_class", ...])``.

    Filled marks are held out, hollow ones the best coefficient; lines are standard errors.
    """
    names = np.array(row_names(table))
    series, classes = list(dict.fromkeys(names)), list(dict.fromkeys(table["concept_class"]))
    alt = f"Steerability by class ({', '.join(classes)}) for {', '.join(series)}"
    height = 1.6 + (0.25 + 0.24 * len(series)) * len(classes)
    figure, axes = panel(ax, 7.4, height, alt)
    step = 0.8 / len(series)
    for number, name in enumerate(series):
        rows = table[names == name]
        shift = step * (number + 0.5) - 0.4
        place = np.array([classes.index(one) for one in rows["concept_class"]]) + shift
        colour, mark = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        # The two scores of a series stand one above the other, so that both errors are seen.
        for score, fill, beside in (("best", "white", -0.2), ("held_out", colour, 0.2)):
            mean, error = _percent(rows, score)
            look = {"fmt": mark, "color": colour, "mfc": fill, "ms": 5, "elinewidth": 1}
            label = plain(name) if score == "held_out" else None
            axes.errorbar(mean, place + beside * step, xerr=error, label=label, **look)
    counts = table.groupby("concept_class")["concepts"].max()
    axes.set_yticks(range(len(classes)), [f"{plain(one)}\nn = {counts[one]}" for one in classes])
    for edge in range(1, len(classes)):
        axes.axhline(edge - 0.5, color=PALE, linewidth=0.8)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlim=(-3, 103))
    axes.set_xlabel("steerability, % of questions (filled: held out, hollow: best coefficient)")
    axes.set_title(plain(title))
    if ax is None:
        figure.legend(loc="outside lower left", ncols=2, fontsize=9)
    else:
        axes.legend(fontsize=9)
    return figure


@styled()
def over_steering(
    answers: pd.DataFrame,
    *,
    unit: str = "mean residual norms",
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """What became of the answers at each coefficient: a bar of the judge's reasons, stacked.

    ``answers``: rows of ``Study.answers``, best of one variant. ``unit``: of the coefficients.
    """
    share = 100 * pd.crosstab(answers["coefficient"], answers["reason"], normalize="index")
    reasons = [*(r for r in REASONS if r in share), *(r for r in share if r not in REASONS)]
    colours = [REASONS.get(reason, GREY) for reason in reasons]
    alt = (
        f"Shares of {', '.join(reasons)} among the answers at {len(share)} coefficients from "
        f"{share.index.min():g} to {share.index.max():g}"
    )
    figure, axes = panel(ax, 7.2, 3.8, alt)
    place, bottom = np.arange(len(share)), np.zeros(len(share))
    for reason, colour in zip(reasons, colours, strict=True):
        heights = share[reason].to_numpy()
        axes.bar(place, heights, 0.86, bottom, color=colour)
        bottom += heights
    axes.set_xticks(place, [f"{coefficient:g}" for coefficient in share.index])
    counts = sorted(set(answers.groupby("coefficient").size()))
    number = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    axes.set(ylim=(0, 100), ylabel="share of answers, %", title=plain(title))
    axes.set_xlabel(f"coefficient, {unit} (n = {number} answers at each)")
    keys = [Patch(color=colour) for colour in colours]
    legend(axes, ax is None, keys[::-1], reasons[::-1])
    return figure


@styled()
def blocks_compared(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Steering the k blocks most enriched in the concept, the k least enriched, and k at random.

    ``table``: ``Study.compare(["blocks"])`` with rows such as "top4", "bottom4", "random4" and,
    as a dashed line with a band of one standard error, "all".
    """
    kinds = {"top": "most enriched", "random": "random", "bottom": "least enriched"}
    found = table["blocks"].str.extract(rf"^({'|'.join(kinds)})(\d+)$")
    sizes = sorted(set(found[1].dropna().astype(int)))
    figure, panels = new_figure(8.6, 3.9, 1, 2, sharey=True)
    for axes, (score, name) in zip(panels, SCORES.items(), strict=True):
        for beside, (kind, words) in enumerate(kinds.items()):
            colour, mark = COLOURS[beside], MARKERS[beside]
            size = found.loc[found[0] == kind, 1].astype(int).sort_values()
            if len(size):
                mean, error = _percent(table.loc[size.index], score)
                place = np.array([sizes.index(one) for one in size]) + 0.16 * (beside - 1)
                look = {"color": colour, "marker": mark, "linestyle": "none", "elinewidth": 1}
                axes.errorbar(place, mean, error, label=words, **look)
        for mean, error in zip(*_percent(table[table["blocks"] == "all"], score), strict=True):
            axes.axhline(mean, color=GREY, linestyle="--", linewidth=1.2, label="all blocks")
            axes.axhspan(mean - error, mean + error, color=GREY, alpha=0.15, linewidth=0)
        axes.set(ylim=(0, 103), xlim=(-0.5, len(sizes) - 0.5))
        axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("steerability, % of questions")
    number = f"number of steered blocks k (± standard error, n = {_number(table)} concepts)"
    figure.supxlabel(number, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = f"Steerability when k blocks are steered, k = {', '.join(map(str, sizes))}"
    return figure


def _number(table: pd.DataFrame) -> str:
    return " to ".join(dict.fromkeys(map(str, (table["concepts"].min(), table["concepts"].max()))))


def _in_words(names: list[str], table: pd.DataFrame) -> str:
    rows = zip(names, 100 * table["held_out"], strict=True)
    return "; ".join(f"{name} {value:.0f} % held out" for name, value in rows)


def _word(key: str, value: Any) -> str:
    return _WORDS.get((key, value)) or _FORMS.get(key, "{}").format(value)


def _controls(table: pd.DataFrame) -> np.ndarray:
    if "control" not in table:
        return np.zeros(len(table), dtype=bool)
    return (table["control"] != "").to_numpy()


def _percent(table: pd.DataFrame, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors, the latter 0 where there is but one concept."""
    return 100 * table[score].to_numpy(), 100 * table[f"{score} ±"].fillna(0).to_numpy()
