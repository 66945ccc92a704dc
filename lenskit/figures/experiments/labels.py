"""Labels by learner and number of prompts, and recipes by what they cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lenskit.figures.experiments.marks import DIFFERENCE, doubling, level, lines, one_two_five, zero
from lenskit.figures.experiments.tables import controls, named, need, number_of, of_class, rows_of
from lenskit.figures.style import PALE, new_figure, plain, styled

_ALL = ("prefix in the prompt", "shuffled labels", "random vector")


@styled()
def labels_by_prompts(
    table: pd.DataFrame, *, measure: str = "held out", concept_class: str = "all", title: str = ""
) -> Figure:
    """Each label's score over the number of prompts, a column of panels for each learner; below it
    the paired difference to hard labels of the same learner and prompts. 95 % intervals.

    ``table``: that of the experiment "labels". Raises ValueError for another one, or a measure that
    it has not.
    """
    need(table, ["way", "labels", "learner", "prompts", "difference"])
    own = rows_of(table, measure, concept_class)
    made = named(own, "labels")
    learners = list(dict.fromkeys(made["learner"]))
    kinds = list(dict.fromkeys(made["labels"]))
    numbers = sorted(set(made["prompts"].dropna()))
    figure, panels = new_figure(
        1.9 + 2.7 * len(learners),
        5.2,
        2,
        len(learners),
        sharex=True,
        sharey="row",
        height_ratios=(1.5, 1),
    )
    keys: dict = {}
    for place, learner in enumerate(learners):
        above, below = panels[place], panels[place + len(learners)]
        series = {
            kind: made[(made["learner"] == learner) & (made["labels"] == kind)] for kind in kinds
        }
        keys |= lines(above, series, "prompts")
        keys |= _levels(above, own)
        zero(below, upright=False)
        lines(below, series, "prompts", names=DIFFERENCE)
        above.set_title(plain(learner), fontsize=10)
        doubling(below, numbers)
    panels[0].set_ylabel(plain(measure))
    panels[len(learners)].set_ylabel("less that of\nhard labels")
    figure.supxlabel(f"prompts (mean, 95 % interval, n = {number_of(made)} concepts)", fontsize=10)
    figure.legend(
        list(keys.values()), [plain(name) for name in keys], loc="outside right upper", fontsize=9
    )
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = (
        f"{measure} of labels {', '.join(kinds)} for learners {', '.join(learners)} from "
        f"{numbers[0]:g} to {numbers[-1]:g} prompts"
    )
    return figure


@styled()
def cost_frontier(
    table: pd.DataFrame, *, measure: str = "held out", concept_class: str = "all", title: str = ""
) -> Figure:
    """What each recipe reaches for its forward passes and seconds, and the frontier.

    The broad pale line joins what no other recipe reaches as cheaply. 95 % intervals are those of
    the score over concepts; both costs are means. ``table``: that of the experiment "cost";
    ValueError for another one.
    """
    need(table, ["way", "recipe", "prompts"])
    own = rows_of(table, measure, concept_class)
    made = named(own, "recipe")
    whole = of_class(table, concept_class)
    costs = [name for name in ("forward passes", "seconds") if name in set(whole["measure"])]
    if not costs:
        raise ValueError("the table has neither forward passes nor seconds; give that of cost")
    figure, panels = new_figure(2.2 + 3.3 * len(costs), 3.9, 1, len(costs), sharey=True)
    keys: dict = {}
    for axes, name in zip(panels, costs, strict=True):
        spent = whole[whole["measure"] == name].set_index("way")["mean"]
        rows = made.assign(spent=made["way"].map(spent))
        rows = rows[rows["spent"] > 0]
        series = {recipe: part for recipe, part in rows.groupby("recipe", sort=False)}
        keys |= lines(axes, series, "spent", dodge=name == "forward passes")
        reached = rows.sort_values(["spent", "mean"], ascending=[True, False])
        best = reached[reached["mean"] > reached["mean"].cummax().shift(fill_value=-np.inf)]
        (keys["frontier"],) = axes.plot(
            best["spent"],
            best["mean"],
            color=PALE,
            linewidth=6,
            marker="o",
            markersize=13,
            zorder=0,
        )
        keys |= _levels(axes, own)
        if name == "forward passes":
            doubling(axes, list(rows["spent"]))
        else:
            one_two_five(axes)
        axes.set_xlabel(f"{name} for a concept's vectors")
    panels[0].set_ylabel(f"{plain(measure)}\n(95 % interval, n = {number_of(made)} concepts)")
    figure.legend(
        list(keys.values()), [plain(name) for name in keys], loc="outside right upper", fontsize=9
    )
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = f"{measure} of {', '.join(dict.fromkeys(made['recipe']))} by {' and '.join(costs)}"
    return figure


def _levels(axes, own: pd.DataFrame) -> dict:
    """Lines at the controls, each in a manner of its own."""
    found = {}
    for style, name in zip(("--", "-.", ":"), _ALL, strict=True):
        rows = own[own["way"] == name]
        if name in controls(own) and len(rows) and rows["mean"].notna().any():
            found[name] = level(axes, float(rows["mean"].iloc[0]), name, style)
    return found
