"""The tables that experiments write, read back, and what all pictures ask of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

WORDS = ("concept_class", "way", "measure", "reference", "control", "token", "labels", "learner")
_MORE_WORDS = ("blocks", "chosen by", "recipe", "model", "reason", "cause", "expected", "what")


def read_table(file: str | Path) -> pd.DataFrame:
    """A table that an experiment has saved; words that are missing are empty, not NaN.

    Words of the judge's reasons and the like are taken as they stand: "None" is a word, too.
    """
    table = pd.read_csv(file, keep_default_na=False)
    for column in table:
        if column in WORDS or column in _MORE_WORDS:
            table[column] = table[column].astype(str)
            continue
        numbers = pd.to_numeric(table[column], errors="coerce")
        if numbers.notna().sum() == (table[column].astype(str) != "").sum():
            table[column] = numbers
    return table


def need(table: pd.DataFrame, columns: Iterable[str], said: str = "table") -> None:
    """Raise ValueError, naming them, where a table lacks columns, or any row."""
    if missing := [column for column in columns if column not in table]:
        raise ValueError(
            f"{said} has no column {', '.join(missing)}; give the table of an experiment, which "
            f"has them (this one has {', '.join(map(str, table.columns))})"
        )
    if not len(table):
        raise ValueError(f"{said} has no rows")


def of_class(table: pd.DataFrame, concept_class: str = "all") -> pd.DataFrame:
    """The rows of one class, or of all concepts together; ValueError where there are none."""
    need(table, ["concept_class", "measure", "mean", "concepts"])
    own = table[table["concept_class"] == concept_class]
    if not len(own):
        there = ", ".join(map(str, dict.fromkeys(table["concept_class"])))
        raise ValueError(f"concept_class={concept_class!r} is not in the table, which has {there}")
    return own


def rows_of(table: pd.DataFrame, measure: str, concept_class: str) -> pd.DataFrame:
    """The rows of one measure and class; ValueError for a measure that the table has not."""
    own = of_class(table, concept_class)
    found = own[own["measure"] == measure]
    if not len(found):
        there = ", ".join(dict.fromkeys(own["measure"]))
        raise ValueError(f"measure={measure!r} is not in the table, which has {there}")
    return found


def named(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have a word in this column, which those of controls have not."""
    return table[table[column].fillna("").astype(str) != ""]


def measured(table: pd.DataFrame, measures: Sequence[str]) -> list[str]:
    """Those of ``measures`` that the table has, in their order."""
    there = set(table["measure"])
    return [measure for measure in measures if measure in there]


def controls(table: pd.DataFrame, by: str = "way") -> list[str]:
    """The controls among the ways, in the order of the table."""
    if "control" not in table:
        return []
    named = table[table["control"].fillna("").astype(str) != ""]
    return list(dict.fromkeys(named[by]))


def columns_of(
    own: pd.DataFrame, names: Sequence[str], index: Sequence[str], by: str
) -> np.ndarray:
    """Numbers ``[name, way]`` of one measure; NaN for a way that has none."""
    table = own.drop_duplicates(by).set_index(by).reindex(index)
    return np.stack(
        [
            table[name].to_numpy(dtype=float) if name in table else np.full(len(index), np.nan)
            for name in names
        ]
    )


def number_of(table: pd.DataFrame) -> str:
    """The number of concepts behind the rows, or its range."""
    counts = table["concepts"].dropna().astype(int)
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return str(low) if low == high else f"{low} to {high}"


def errors(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of an interval's two arms, 0 where there is none: ``[2, …]`` for an error bar."""
    arms = np.stack([mean - low, high - mean])
    return np.clip(np.nan_to_num(arms, nan=0.0), 0.0, None)
