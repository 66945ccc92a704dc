"""Pictures of a study's scores: by variant, by class, by coefficient, by steered blocks."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
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
    end_labels,
    new_figure,
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
def steerability_bars(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Both scores with their standard errors: two bars for each row of ``Study.compare``.

    Rows are named by the columns in which they differ; controls are grey.
    """
    names, control = row_names(table), _controls(table)
    longest = max(len(name) for name in names)
    figure, (axes,) = new_figure(5.6 + 0.075 * longest, 1.4 + 0.46 * len(table))
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
    counts = sorted(set(table["concepts"]))
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set_xlabel(f"steerability, % of questions ± standard error, {number} concepts")
    axes.set_title(plain(title))
    keys = [Patch(color=SKY), Patch(color=BLUE)]
    figure.legend(keys, list(SCORES.values()), loc="outside lower right", ncols=2, fontsize=9)
    return figure


@styled()
def steerability_by_class(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Both scores of each class: ``table`` is ``Study.compare(["concept_class", ...])``.

    Filled marks are held out, hollow ones the best coefficient; lines are standard errors.
    """
    names = np.array(row_names(table))
    series, classes = list(dict.fromkeys(names)), list(dict.fromkeys(table["concept_class"]))
    figure, (axes,) = new_figure(7.4, 1.6 + (0.25 + 0.17 * len(series)) * len(classes))
    for number, name in enumerate(series):
        rows = table[names == name]
        shift = 0.76 * ((number + 0.5) / len(series) - 0.5)
        place = np.array([classes.index(one) for one in rows["concept_class"]]) + shift
        colour, mark = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for score, fill in (("best", "white"), ("held_out", colour)):
            mean, error = _percent(rows, score)
            look = {"fmt": mark, "color": colour, "mfc": fill, "ms": 6, "elinewidth": 1}
            label = plain(name) if score == "held_out" else None
            axes.errorbar(mean, place, xerr=error, label=label, **look)
    axes.set_yticks(range(len(classes)), [plain(name) for name in classes])
    for edge in range(1, len(classes)):
        axes.axhline(edge - 0.5, color=PALE, linewidth=0.8)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlim=(-3, 103))
    axes.set_xlabel("steerability, % of questions (filled: held out, hollow: best coefficient)")
    axes.set_title(plain(title))
    figure.legend(loc="outside lower left", ncols=2, fontsize=9)
    return figure


@styled()
def over_steering(
    answers: pd.DataFrame, *, unit: str = "mean residual norms", title: str = ""
) -> Figure:
    """What became of the answers at each coefficient: shares of the judge's reasons, stacked.

    ``answers``: rows of ``Study.answers``, best of one variant. ``unit``: of the coefficients.
    """
    share = 100 * pd.crosstab(answers["coefficient"], answers["reason"], normalize="index")
    reasons = [*(r for r in REASONS if r in share), *(r for r in share if r not in REASONS)]
    heights = share[reasons].to_numpy().T
    figure, (axes,) = new_figure(7.2, 3.8)
    colours = [REASONS.get(reason, GREY) for reason in reasons]
    axes.stackplot(share.index, heights, colors=colours, edgecolor="white", linewidth=0.6)
    axes.set(xlim=(share.index.min(), share.index.max()), ylim=(0, 100), xticks=share.index)
    axes.set(xlabel=f"coefficient, {unit}", ylabel="share of answers, %", title=plain(title))
    keys = [Patch(color=colour) for colour in colours]
    figure.legend(keys[::-1], reasons[::-1], loc="outside right upper", fontsize=9)
    return figure


@styled()
def blocks_compared(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Steering the k blocks most enriched in the concept, the k least enriched, and k at random.

    ``table``: ``Study.compare(["blocks"])`` with rows such as "top4", "bottom4", "random4" and,
    as a dashed line, "all".
    """
    kinds = {"top": "most enriched", "random": "random", "bottom": "least enriched"}
    found = table["blocks"].str.extract(rf"^({'|'.join(kinds)})(\d+)$")
    sizes = sorted(set(found[1].dropna().astype(int)))
    figure, panels = new_figure(8.6, 3.7, 1, 2, sharey=True)
    for axes, (score, name) in zip(panels, SCORES.items(), strict=True):
        ends: dict[str, tuple[float, Any]] = {}
        for (kind, words), colour, mark in zip(kinds.items(), COLOURS, MARKERS, strict=False):
            size = found.loc[found[0] == kind, 1].astype(int).sort_values()
            if len(size):
                mean, error = _percent(table.loc[size.index], score)
                axes.errorbar(size, mean, error, color=colour, marker=mark, elinewidth=1)
                ends[words] = (mean[-1], colour)
        for mean, _ in zip(*_percent(table[table["blocks"] == "all"], score), strict=True):
            axes.axhline(mean, color=GREY, linestyle="--", linewidth=1.2)
            ends["all blocks"] = (mean, GREY)
        axes.set(ylim=(0, 103), xticks=sizes, xlabel="number of steered blocks k")
        axes.set_title(name, fontsize=10)
        end_labels(axes, ends)
    panels[0].set_ylabel("steerability, % of questions")
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    return figure


def _word(key: str, value: Any) -> str:
    return _WORDS.get((key, value)) or _FORMS.get(key, "{}").format(value)


def _controls(table: pd.DataFrame) -> np.ndarray:
    if "control" not in table:
        return np.zeros(len(table), dtype=bool)
    return (table["control"] != "").to_numpy()


def _percent(table: pd.DataFrame, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors, the latter 0 where there is but one concept."""
    return 100 * table[score].to_numpy(), 100 * table[f"{score} ±"].fillna(0).to_numpy()
