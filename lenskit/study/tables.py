"""Tables for the terminal, and a study's own files beside its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from lenskit.study.study import Study

KEYS = ("concept_class", "token", "labels", "learner", "blocks")


def score_table(table: pd.DataFrame, differences: pd.DataFrame | None = None) -> Table:
    """The rows of ``Study.compare`` with both scores, in % of questions ± standard error.

    Controls come last, each by its name; columns that never vary are left out. With the
    ``differences`` of ``paired_differences`` two columns more: each row's held-out score less that
    of the first, with its interval, and the share of concepts that can be steered at all.
    """
    control = table["control"] != "" if "control" in table else pd.Series(False, table.index)
    keys = [key for key in table if key in KEYS]
    varied = [key for key in keys if table.loc[~control, key].nunique() > 1] or keys[:1]
    low, high = table["concepts"].min(), table["concepts"].max()
    number = f"{low}" if low == high else f"{low} to {high}"
    shown = Table(
        title=f"Steerability, % of questions ± standard error ({number} concepts)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for key in varied:
        shown.add_column(key.replace("_", " "), no_wrap=True)
    for name in ("best", "held out"):
        shown.add_column(name, justify="right", no_wrap=True)
    paired = {} if differences is None else _by_variant(differences)
    for name in ("held out − first", "steerable") if paired else ():
        shown.add_column(name, justify="right", no_wrap=True)
    for part in (table[~control], table[control]):
        if len(part):
            shown.add_section()
        for row in part.to_dict("records"):
            own = [row[key] for key in varied]
            names = [row["control"], *[""] * len(own[1:])] if row.get("control") else own
            more = paired[_variant(row)] if paired else ()
            scores = (_percent(row, "best"), _percent(row, "held_out"))
            shown.add_row(*map(str, names), *scores, *more)
    return shown


def write_tables(study: Study, folder: Path) -> list[Path]:
    """Write ``answers.csv`` (a row for each answer) and ``summary.csv`` (for each variant)."""
    tables = {"answers.csv": study.answers, "summary.csv": study.compare()}
    for name, table in tables.items():
        # Two processes may finish a study at the same moment.
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        # Half of a surrogate pair, which models do write, is no UTF-8: it becomes \\udxxx.
        table.to_csv(temporary, index=False, encoding="utf-8", errors="backslashreplace")
        temporary.replace(folder / name)
    return [folder / name for name in tables]


def table_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a table; half of a surrogate pair, which none holds, is shown as \\udxxx."""
    try:
        return pd.DataFrame(rows)
    except UnicodeEncodeError:
        return pd.DataFrame([{k: _shown(v) for k, v in row.items()} for row in rows])


def _shown(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _variant(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in (*KEYS[1:], "control"))


def _by_variant(differences: pd.DataFrame) -> dict[tuple[Any, ...], tuple[str, str]]:
    found = {}
    for place, row in enumerate(differences.to_dict("records")):
        mean, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        ends = f" [{low:+.1f}, {high:+.1f}]" if low == low else ""
        shown = f"{mean:+.1f}{ends}" if place else ""
        found[_variant(row)] = (shown, f"{100 * row['steerable']:.0f} %")
    return found


def _percent(row: dict[str, Any], score: str) -> str:
    mean, error = 100 * row[score], 100 * row[f"{score} ±"]
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error == error else "")
