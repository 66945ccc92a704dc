"""Tables for the terminal, and a study's own files beside its answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from lenskit.study import Study

KEYS = {"concept_class", "token", "labels", "learner", "blocks", "control"}


def score_table(table: pd.DataFrame, *, title: str = "") -> Table:
    """The rows of ``Study.compare`` with both scores, in % of questions, ± standard errors.

    Controls come last, each by its name; columns that never vary are left out.
    """
    control = table["control"] != "" if "control" in table else pd.Series(False, table.index)
    keys = [key for key in table if key in KEYS - {"control"}]
    varied = [key for key in keys if table.loc[~control, key].nunique() > 1] or keys[:1]
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for key in varied:
        shown.add_column(key.replace("_", " "), no_wrap=True)
    for name in ("best", "held out", "concepts"):
        shown.add_column(name, justify="right", no_wrap=True)
    for part in (table[~control], table[control]):
        if len(part):
            shown.add_section()
        for row in part.to_dict("records"):
            grey = bool(row.get("control"))
            names = (
                [row["control"], *[""] * (len(varied) - 1)] if grey else [row[k] for k in varied]
            )
            scores = [_percent(row, score) for score in ("best", "held_out")]
            shown.add_row(*map(str, names), *scores, str(row["concepts"]))
    return shown


def write_tables(study: Study, folder: Path) -> list[Path]:
    """Write ``answers.csv`` (a row for each answer) and ``summary.csv`` (for each variant)."""
    tables = {"answers.csv": study.answers, "summary.csv": study.compare()}
    for name, table in tables.items():
        # Two processes may finish a study at the same moment.
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        table.to_csv(temporary, index=False, encoding="utf-8")
        temporary.replace(folder / name)
    return [folder / name for name in tables]


def _percent(row: dict[str, Any], score: str) -> str:
    mean, error = 100 * row[score], 100 * row[f"{score} ±"]
    return f"{mean:.1f}" + (f" ± {error:.1f}" if error == error else "")
