"""What a prompt and a notebook show of an object: one short table, however large the object is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from itertools import groupby
from math import isnan
from statistics import median
from typing import Any

LINES, WIDTH = 15, 96


class Displayed:
    """Shows an object as a headline and named rows, by default the fields of a dataclass.

    Of a tensor the named axes are shown, as its annotation has them. A dataclass whose own line is
    short keeps it; with ``repr=False`` it prints the table too.
    """

    def __repr__(self) -> str:
        return text_table(self._headline(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._headline(), self._rows())

    def _headline(self) -> str:
        return type(self).__name__

    def _rows(self) -> dict[str, object]:
        known: tuple[Any, ...] = fields(self) if is_dataclass(self) else ()
        return {each.name: told(getattr(self, each.name), each.type) for each in known if each.repr}


def text_table(headline: str, rows: Mapping[str, object]) -> str:
    """The headline and a line for each row."""
    kept = list(rows.items())[: LINES - 1]
    wide = max((len(name) for name, _ in kept), default=0)
    lines = [headline, *(f"  {name:<{wide}}  {told(value)}" for name, value in kept)]
    return "\n".join(clipped(line, WIDTH) for line in lines)


def html_table(headline: str, rows: Mapping[str, object]) -> str:
    """The same as a table in the colours of its page."""
    left = 'style="text-align:left"'
    body = "".join(
        f"<tr><th {left}>{escape(clipped(name, WIDTH))}</th>"
        f"<td {left}>{escape(clipped(told(value), WIDTH))}</td></tr>"
        for name, value in list(rows.items())[: LINES - 1]
    )
    return f"<table><caption {left}>{escape(clipped(headline, WIDTH))}</caption>{body}</table>"


def told(value: object, annotation: object = "") -> str:
    """A value in a few words; of a tensor its axes, named as the annotation has them."""
    if isinstance(value, Displayed):
        return value._headline()
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "shape") and hasattr(value, "ndim"):
        return _axes(value, annotation)
    if isinstance(value, Mapping | Sequence):
        return quoted(value)
    return repr(value)


def _axes(value: Any, annotation: object) -> str:
    named = re.search(r"""["']([^"']*)["']\s*\]""", str(annotation))
    names = named[1].split() if named else []
    if len(names) > value.ndim:  # an axis with a star need not be there
        names = [name for name in names if not name.startswith("*")]
    if len(names) != value.ndim:
        names = [""] * value.ndim
    sizes = (
        f"{name.lstrip('*')} {size}".strip() for name, size in zip(names, value.shape, strict=True)
    )
    return " × ".join(sizes) or f"{value}"


def quoted(values: Iterable[object]) -> str:
    """The first of some values, texts in quotes."""
    shown: list[str] = []
    length = 0
    for value in values:
        shown.append(repr(value) if isinstance(value, str) else told(value))
        length += len(shown[-1]) + 2
        if length > WIDTH:
            break
    return ", ".join(shown) or "none"


def spread(values: Iterable[float]) -> str:
    """Smallest, largest and median number; NaN is left out."""
    known = [float(value) for value in values if not isnan(value)]
    if not known:
        return "unknown"
    low, high, middle = min(known), max(known), median(known)
    if f"{low:.3g}" == f"{high:.3g}":
        return f"{low:.3g}"
    return f"{low:.3g} to {high:.3g}, median {middle:.3g}"


def by_block(values: Iterable[object]) -> str:
    """A value for each block, blocks with equal ones together: ``0-3 'a', 4 'b'``."""
    runs = [
        (run[0][0], run[-1][0], value)
        for value, group in groupby(enumerate(values), key=lambda pair: pair[1])
        if (run := list(group))
    ]
    spans = (f"{a}" if a == b else f"{a}-{b}" for a, b, _ in runs)
    return ", ".join(f"{span} {value!r}" for span, (*_, value) in zip(spans, runs, strict=True))


def count(number: int, noun: str) -> str:
    """ "1 prompt", "400 prompts"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def clipped(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in one line."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:width]) + text[width:]
    return text if len(text) <= width else text[: width - 1] + "…"
