"""From judged answers to four scores of every way, with intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lenskit.scoring import mean_interval, steerability

CONCEPT = ["concept_class", "concept"]
SCORES = ("best", "held out", "one coefficient", "same divergence", "steerable")
DRAWS = 2000


def by_concept(answers: pd.DataFrame) -> pd.DataFrame:
    """A row for each concept and way, with its scores from 0 to 1; NaN where there is none.

    ``best``: each question's best coefficient (AGS; optimistic). ``held out``: the coefficient
    chosen on two questions and scored on the others. ``one coefficient``: that which is best for
    all other concepts together. ``same divergence``: at the coefficient that moves the model by the
    experiment's target. ``steerable``: 1 where any coefficient brings the concept into any answer.
    ``coefficient`` and ``calibrated``: that which is best over all questions, and the calibrated.
    """
    rows, tables = [], {}
    for key, own in answers[answers["score"].notna()].groupby([*CONCEPT, "way"], sort=False):
        still = bool((own["coefficient"] == 0).all())
        grid = own if still else own[~own["calibrated"].astype(bool)]
        scaled = own[own["calibrated"].astype(bool)]
        table = grid.pivot_table(index="coefficient", columns="question", values="score")
        tables[key] = table.mean(axis=1)
        found = steerability(torch.tensor(table.to_numpy()), list(table.index))
        rows.append(
            dict(zip([*CONCEPT, "way"], key, strict=True))
            | {
                "best": found.best,
                "held out": found.held_out,
                "one coefficient": found.best if still else float("nan"),
                "same divergence": scaled["score"].mean() if len(scaled) else float("nan"),
                "steerable": float(found.best > 0),
                "coefficient": table.index[found.coefficient],
                "calibrated": scaled["coefficient"].iloc[0] if len(scaled) else float("nan"),
            }
        )
    found = pd.DataFrame(rows)
    for _, own in found.groupby("way", sort=False):
        keys = [tuple(row) for row in own[[*CONCEPT, "way"]].itertuples(index=False)]
        if own["one coefficient"].isna().all():
            found.loc[own.index, "one coefficient"] = _of_all_others([tables[k] for k in keys])
    return found


def _of_all_others(means: Sequence[pd.Series]) -> list[float]:
    """Each concept's mean score at the coefficient that is best for all others; NaN for one alone.

    Of equal coefficients the smallest in size is taken.
    """
    table = pd.concat(means, axis=1).T.reset_index(drop=True)
    table = table[sorted(table.columns, key=abs)]
    chosen = best_for_others(table)
    return [float(table.loc[at, chosen[at]]) if at in chosen else math.nan for at in table.index]


def best_for_others(table: pd.DataFrame) -> dict[Any, Any]:
    """By the name of each row, the column whose mean over all *other* rows is highest.

    The first of equal ones; a row that is alone has none.
    """
    if len(table) < 2:
        return {}
    return {row: table.drop(index=row).mean().idxmax() for row in table.index}


def summary(
    rows: pd.DataFrame,
    measures: Iterable[str],
    *,
    name: str = "way",
    reference: str | Mapping[str, str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over concepts with bootstrap intervals, and paired differences to ``reference``.

    ``rows``: one for each concept and ``name``, with a column for each of ``measures``. A row of
    the result for each class and for "all", each ``name`` and measure: ``mean`` with the 95 %
    interval ``low`` to ``high``, the mean ``difference`` to the ``reference`` (by default the first
    row, or one for each ``name``) over the concepts that have both, with its own interval, and the
    number of ``concepts``.
    """
    measures = list(measures)
    if not len(rows):
        return pd.DataFrame(columns=["concept_class", name, "measure", "mean", "concepts"])
    first = rows[name].iloc[0] if reference is None else reference
    classes = list(dict.fromkeys(rows["concept_class"]))
    parts = {"all": rows}
    if len(classes) > 1:
        parts |= {one: rows[rows["concept_class"] == one] for one in classes}
    found = []
    for of, part in parts.items():
        for measure in measures:
            table = part.pivot_table(index=CONCEPT, columns=name, values=measure, sort=False)
            for one in dict.fromkeys(part[name]):
                if one not in table:
                    continue
                values = table[one].dropna().to_numpy()
                row: dict[str, Any] = {"concept_class": of, name: one, "measure": measure}
                row |= _interval(values, "mean", "low", "high", seed)
                to = first if isinstance(first, str) else first.get(one, "")
                gained = (table[one] - table[to]).dropna() if to in table else pd.Series()
                ends = ("difference", "difference_low", "difference_high")
                row |= _interval(gained.to_numpy(dtype=float), *ends, seed)
                found.append(row | {"concepts": len(values), "reference": to})
    return pd.DataFrame(found)


def _interval(values: np.ndarray, mean: str, low: str, high: str, seed: int) -> dict[str, float]:
    ends = mean_interval(values, draws=DRAWS, seed=seed)
    return {
        mean: float(values.mean()) if len(values) else float("nan"),
        low: ends[0],
        high: ends[1],
    }


def chosen_elsewhere(
    answers: pd.DataFrame, groups: Mapping[str, Sequence[str]], score: str = "held out"
) -> pd.DataFrame:
    """Answers of ways whose choice among others (of a block, say) was made on other concepts.

    ``groups``: for each new way those it chooses from. For every concept it is the one whose mean
    ``score`` over all *other* concepts is highest; with a single concept there is none to choose
    on, and no answers.
    """
    wanted = {one for members in groups.values() for one in members}
    table = by_concept(answers[answers["way"].isin(wanted)])
    parts = []
    for name, members in groups.items():
        wide = table[table["way"].isin(members)].pivot_table(
            index=CONCEPT, columns="way", values=score, sort=False
        )
        wide = wide[[one for one in members if one in wide]]
        for concept, chosen in best_for_others(wide).items():
            own = answers[
                (answers["way"] == chosen)
                & (answers["concept_class"] == concept[0])
                & (answers["concept"] == concept[1])
            ]
            parts.append(own.assign(way=name, chosen=chosen))
    return pd.concat(parts, ignore_index=True) if parts else answers.iloc[:0].assign(chosen="")
