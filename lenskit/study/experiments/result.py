"""What an experiment found: a table that prints, and is saved with the command that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from lenskit._display import LINES, Displayed, clipped, count

# So many rows of a table of its own are shown in the text file, which is to be read.
_SHOWN = 60
_NAME = 33


@dataclass(frozen=True, repr=False, eq=False)
class Experiment(Displayed):
    """What was compared (``name``, ``question``), by which ``command``, and what was found.

    ``table``: a row for each class of concepts and "all", way (the column ``by``) and measure:
    ``mean`` over ``concepts`` with its 95 % bootstrap interval ``low`` to ``high``, and the paired
    ``difference`` to the ``reference`` with its own. ``parts``: tables of what stands behind it,
    by name. ``answers``: every answer with its verdict. ``notes``: what a reader must know.
    ``group`` and ``counted``: the columns that stand in the place of ``concept_class`` and
    ``concepts`` where prompts of tasks are compared.
    """

    name: str
    question: str
    command: str
    table: pd.DataFrame
    reference: str = ""
    by: str = "way"
    parts: Mapping[str, pd.DataFrame] = field(default_factory=lambda: MappingProxyType({}))
    answers: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: Sequence[str] = ()
    group: str = "concept_class"
    counted: str = "concepts"

    def _headline(self) -> str:
        number = int(self.table[self.counted].max()) if len(self.table) else 0
        of = count(number, "concept" if self.counted == "concepts" else "prompt")
        return f"Experiment {self.name!r}, {of}: {self.question}"

    def _rows(self) -> dict[str, object]:
        wide = self.wide()
        shown: dict[str, object] = {self.by: "  ".join(map(str, wide.columns))}
        for name, row in zip(wide.index, wide.to_numpy(), strict=True):
            cells = zip(wide.columns, row, strict=True)
            means = (f"{_number(value):>{len(str(column))}}" for column, value in cells)
            shown[clipped(str(name), _NAME)] = "  ".join(means)
        rest = len(wide) - (LINES - 3)
        if rest > 1:
            kept = dict(list(shown.items())[: LINES - 2])
            return kept | {"…": f"{rest} more in .wide()"}
        return shown

    @property
    def measures(self) -> list[str]:
        """What was measured."""
        return list(dict.fromkeys(self.table["measure"]))

    def wide(self, concept_class: str = "all", value: str = "mean") -> pd.DataFrame:
        """A row for each way and a column for each measure, of one class or of all."""
        own = self.table[self.table[self.group] == concept_class]
        wide = own.pivot_table(index=self.by, columns="measure", values=value, sort=False)
        return wide.reindex(columns=[each for each in self.measures if each in wide])

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``NAME.csv``, ``NAME-PART.csv``, ``NAME-answers.csv`` and ``NAME.md``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"": self.table, **{f"-{name}": part for name, part in self.parts.items()}}
        tables |= {"-answers": self.answers} if len(self.answers) else {}
        written = []
        for ending, table in tables.items():
            written.append(folder / f"{self.name}{ending.replace(' ', '-')}.csv")
            _write(written[-1], table.to_csv(index=False))
        written.append(folder / f"{self.name}.md")
        _write(written[-1], self.markdown())
        return written

    def markdown(self) -> str:
        """The tables for a reader, with what they are of and the command that made them."""
        lines = [f"# {self.name}", "", self.question, ""]
        cells = _cells(self._all(), self.by, self.measures, self.reference, self.counted)
        lines += [_table(*cells), ""]
        classes = [one for one in dict.fromkeys(self.table[self.group]) if one != "all"]
        grouped = "class" if self.group == "concept_class" else self.group
        for measure in self.measures[:2] if classes else ():
            own = self.table[self.table["measure"] == measure]
            wide = own.pivot_table(
                index=self.by, columns=self.group, values="mean", sort=False
            ).reindex(columns=classes)
            wide = wide.dropna(axis=1, how="all")
            body = [
                [str(name), *map(_number, row)]
                for name, row in zip(wide.index, wide.to_numpy(), strict=True)
            ]
            head = [self.by, *map(str, wide.columns)]
            lines += [f"## {measure}, by {grouped}", "", _table(head, body), ""]
        for name, part in self.parts.items():
            lines += [f"## {name}", ""]
            if len(part) <= _SHOWN:
                body = [[_number(value) for value in row] for row in part.to_numpy()]
                lines += [_table(list(map(str, part.columns)), body), ""]
            else:
                lines += [f"{len(part)} rows, in `{self.name}-{name.replace(' ', '-')}.csv`.", ""]
        lines += [f"{note}\n" for note in self.notes]
        lines += [f"`{self.command}`", ""]
        return "\n".join(lines)

    def _all(self) -> pd.DataFrame:
        return self.table[self.table[self.group] == "all"]


def _write(path: Path, text: str) -> None:
    # Half of a surrogate pair, which models do write, is no UTF-8: it becomes \\udxxx.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _cells(
    table: pd.DataFrame, by: str, measures: Sequence[str], reference: str, counted: str
) -> tuple[list[str], list[list[str]]]:
    body = []
    for name, own in table.groupby(by, sort=False):
        rows = own.set_index("measure")
        line = [str(name)]
        for measure in measures:
            row = rows.loc[measure] if measure in rows.index else None
            line.append("" if row is None else _spread(row["mean"], row["low"], row["high"]))
        if reference:
            chosen = "held out" if "held out" in rows.index else measures[0]
            row = rows.loc[chosen] if chosen in rows.index else None
            gained = (
                ""
                if row is None or name == row["reference"]
                else _spread(
                    row["difference"], row["difference_low"], row["difference_high"], signed=True
                )
            )
            line.append(gained)
        line.append(str(int(own[counted].max())))
        body.append(line)
    of = "held out" if "held out" in measures else (measures[0] if measures else "")
    less = [f"{of}, less «{reference}»"] if reference else []
    return [by, *measures, *less, counted], body


def _spread(mean: float, low: float, high: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if mean != mean:
        return ""
    ends = f" [{low:{sign}.2f}, {high:{sign}.2f}]" if low == low else ""
    return f"{mean:{sign}.2f}{ends}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(str(c).replace('|', '/') for c in line)} |" for line in lines)
