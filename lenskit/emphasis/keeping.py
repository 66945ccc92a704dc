"""What was fitted or answered is kept in a folder and read from there the next time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn

from lenskit._progress import Bars
from lenskit.study import CellStore, Row


class Keeping:
    """The parts of one experiment, each computed once: ``rows(name, make)``."""

    def __init__(self, store: CellStore, tell: Callable[[str], None]) -> None:
        self._store, self._tell = store, tell

    def has(self, *key: str) -> bool:
        """Whether a part is kept already."""
        return key in self._store.cells

    def rows(self, *key: str, make: Callable[[], Sequence[Row]]) -> list[Row]:
        """The rows of a part, kept or made now; they have gone through JSON in any case."""
        self._tell(", ".join(key))
        if key not in self._store.cells:
            self._store.add({key: make()})
        return self._store.cells[key]


@contextmanager
def keeping(
    name: str, out: str | Path | None, settings: Mapping[str, Any], progress: bool
) -> Iterator[Keeping]:
    """Raises ValueError where the folder holds results of other settings."""
    folder = None if out is None else Path(out) / "cells" / name
    store = CellStore(folder, {"experiment": name, **settings})
    columns = (TextColumn("{task.description}"), BarColumn())
    with Bars(*columns, disable=not progress) as bar:
        task = bar.add_task(name, total=None)
        try:
            yield Keeping(store, lambda part: bar.update(task, description=f"{name}: {part}"))
        finally:
            store.close()
