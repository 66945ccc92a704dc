"""Reading files that others may have damaged: errors name the file and the place in it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["open_regular", "parse_json", "read_json"]


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened to be read; raises ValueError for a folder, a FIFO or a device.

    A FIFO is refused at once, where reading it would wait for ever.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def read_json(path: str | Path, *, most: int = 2**24) -> Any:
    """The JSON of a file of at most ``most`` bytes; raises ValueError that names file and place."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} holds more than {most:,} bytes, too many for what it should be")
    return parse_json(data, str(path))


def parse_json(data: bytes, place: str) -> Any:
    """The JSON in UTF-8 text; raises ValueError that begins with ``place``."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"{place}: {error}") from None
