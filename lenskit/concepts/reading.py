"""Files that people wrote, read strictly: every mistake names the file and its place."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

LARGEST = 10_000_000  # bytes; the longest list of concepts or statements is far below
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_text(file: Path, *, largest: int = LARGEST) -> str:
    """The text of a UTF-8 file (a byte order mark is left out).

    Raises FileNotFoundError for a missing file, ValueError for what is no plain file (a folder,
    a pipe), is larger than ``largest`` bytes, or is in another encoding, naming line and column.
    """
    kind = file.stat().st_mode
    # A pipe would be waited for without end.
    if not stat.S_ISREG(kind):
        raise ValueError(f"{file} is not a plain file")
    with file.open("rb") as opened:
        data = opened.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{file} is larger than {largest:,} bytes; is it the right file?")
    for mark, name in _MARKS.items():
        if data.startswith(mark) and name == "UTF-16":
            raise ValueError(f"{file} is in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - before.rfind(b"\n")
        raise ValueError(
            f"{file}: line {line}, column {column} is not UTF-8 (byte 0x{data[error.start]:02x}, "
            "as Latin-1 or Windows-1252 would have it); save the file as UTF-8"
        ) from error
    if "\0" in text:
        place = text.index("\0")
        raise ValueError(
            f"{file}: line {text.count(chr(10), 0, place) + 1} holds a NUL character; is the file "
            "in UTF-16? Save it as UTF-8"
        )
    return text


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError naming the place, and as ``read_text``."""
    text = read_text(file)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None


def read_yaml(file: Path) -> Any:
    """What a YAML file holds, of plain values only; raises ValueError as ``read_text``.

    Aliases are refused, since a few lines of them can unfold to any size.
    """
    import yaml  # comes with transformers

    text = read_text(file)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"{file}: line {event.start_mark.line + 1} has the alias *{event.anchor}; "
                    "write the text out"
                )
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark
        where = f": line {place.line + 1}, column {place.column + 1}" if place else ""
        raise ValueError(f"{file}{where} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
