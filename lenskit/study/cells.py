"""A folder of results that grows cell by cell, and survives a kill at any point.

A *cell* is the smallest result: a key of a few words, and its rows. ``settings.json`` says what
the cells were computed with; it is written before the first of them. Each run that writes has a
file of its own, ``cells-*.jsonl``, to which it only appends. A line holds the cells of one group,
a digest of the settings, and a checksum over both: it counts as a whole or not at all. A line torn
by a kill, or damaged later, is not there; its cells are computed again. Cells of other settings
are refused wherever they are found. A cell that two runs computed counts once.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lenskit._files import open_regular, parse_json, read_json

Key = tuple[str, ...]
Row = dict[str, Any]

SETTINGS = "settings.json"
_LAYOUT = "cells 1"
_MOST_LINE = 2**28
_CHECK = b'{"check": "'


class CellStore:
    """The cells of one run: those that ``folder`` holds already, and those that are added.

    ``folder=None`` keeps them in memory alone. ``settings`` is JSON that says what decides the
    results, and no more than that. ``damaged`` names each line that does not count, with its file.

    Raises ValueError where the folder, or a line in it, is of other settings or of another layout.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings = json.loads(_text(settings))
        self.cells: dict[Key, list[Row]] = {}
        self.damaged: tuple[str, ...] = ()
        self._digest = _digest(self.settings)
        self._handle: int | None = None
        if self.folder is not None:
            _claim(self.folder, self.settings)
            self.cells, self.damaged = _read(self.folder, self._digest)

    @classmethod
    def existing(cls, folder: str | Path) -> CellStore:
        """The cells that a folder holds, whatever its settings; ValueError where it holds none."""
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            _refuse_old(folder)
            raise ValueError(f"out={str(folder)!r} holds no study: it has no {SETTINGS}")
        return cls(folder, read_settings(folder))

    def add(self, cells: Mapping[Key, Sequence[Row]]) -> None:
        """Keep these cells, all of them or none; they are on the disk when this returns."""
        text = _text([[key, rows] for key, rows in cells.items()])
        if self.folder is not None:
            self._append(text)
        # As they will be read again, so that a run and its resumption give the same tables.
        self.cells.update(_cells(json.loads(text)))

    def close(self) -> None:
        """Let go of the file; further cells would open another."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _append(self, text: str) -> None:
        if self._handle is None:
            assert self.folder is not None
            name = f"cells-{time.time_ns()}-{secrets.token_hex(6)}.jsonl"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._handle = os.open(self.folder / name, flags, 0o666)
        rest = f'", "settings": "{self._digest}", "cells": {text}}}'.encode("ascii")
        line = _CHECK + _checksum(rest) + rest + b"\n"
        try:
            while line:
                line = line[os.write(self._handle, line) :]
            os.fsync(self._handle)
        except BaseException:
            # A full disk or Ctrl-C tears the line; what is added later must not follow it.
            self.close()
            raise


def read_settings(folder: str | Path) -> Any:
    """What the cells of a folder were computed with."""
    file = Path(folder) / SETTINGS
    found = read_json(file)
    if not isinstance(found, dict) or found.get("layout") != _LAYOUT or "settings" not in found:
        raise ValueError(f"{file} is not of the layout {_LAYOUT!r}, which this lenskit reads")
    return found["settings"]


def _claim(folder: Path, settings: Any) -> None:
    """Write the settings, or see that those that are there are the same."""
    file = folder / SETTINGS
    if not file.exists():
        _refuse_old(folder)
        if lines := sorted(folder.glob("cells-*.jsonl")):
            raise ValueError(
                f"out={str(folder)!r} has results ({lines[0].name}) without {SETTINGS}, so nobody "
                "knows what they were computed with; restore it, or choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{SETTINGS}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        temporary.write_text(
            json.dumps({"layout": _LAYOUT, "settings": settings}, indent=1) + "\n", encoding="ascii"
        )
        temporary.replace(file)
    # Also one's own: another process may have written its settings at the same moment.
    kept = read_settings(folder)
    if kept != settings:
        names = ", ".join(list(_differences(kept, settings, ""))[:5])
        raise ValueError(
            f"out={str(folder)!r} holds a study with other settings (they differ in {names}); "
            "choose another folder, or remove that one to start again"
        )


def _refuse_old(folder: Path) -> None:
    if (folder / "study.settings").exists():
        raise ValueError(
            f"out={str(folder)!r} holds a study of an earlier lenskit (study.settings and a file "
            "for each concept), whose files say too little to go on from; choose another folder"
        )


def _read(folder: Path, digest: str) -> tuple[dict[Key, list[Row]], tuple[str, ...]]:
    cells: dict[Key, list[Row]] = {}
    damaged = []
    # The first of two that computed the same: a table does not change once it is whole.
    for path in sorted(folder.glob("cells-*.jsonl")):
        for number, line in _lines(path):
            place = f"{path}, line {number}"
            try:
                found = _checked(line, place)
            except ValueError as error:
                damaged.append(str(error))
                continue
            if found["settings"] != digest:
                raise ValueError(f"{place} was computed with other settings than {SETTINGS} says")
            for key, rows in _cells(found["cells"]).items():
                cells.setdefault(key, rows)
    return cells, tuple(damaged)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_regular(path) as file:
        number = 1
        while line := file.readline(_MOST_LINE):
            yield number, line
            if not line.endswith(b"\n"):
                return  # torn, or far too long
            number += 1


def _checked(line: bytes, place: str) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise ValueError(f"{place} is torn")
    start = len(_CHECK) + 32
    rest = line[start:-1]
    if line[:start] != _CHECK + _checksum(rest):
        raise ValueError(f"{place} is damaged: it does not match its checksum")
    return parse_json(line, place)


def _cells(found: Any) -> dict[Key, list[Row]]:
    return {tuple(key): rows for key, rows in found}


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest()[:32].encode("ascii")


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    # numpy's and torch's numbers are numbers.
    return json.dumps(value, default=lambda other: other.item())


def _differences(one: Any, other: Any, name: str) -> Iterator[str]:
    """The names of settings that are not the same, the outer ones that say enough."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield name or "everything"
        return
    for key in dict.fromkeys((*one, *other)):
        if key not in one or key not in other:
            yield f"{name}.{key}".lstrip(".")
        else:
            yield from _differences(one[key], other[key], f"{name}.{key}".lstrip("."))
