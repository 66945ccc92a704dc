"""Progress bars that leave nothing behind, in a terminal or in a notebook."""

from __future__ import annotations

import html
import os
import time
from io import StringIO
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

PATIENCE = 1.0  # seconds before a notebook shows a bar at all
PAUSE = 0.2  # seconds between two pictures of it


class Bars(Progress):
    """rich's ``Progress``, gone when it is done.

    rich shows a widget in notebooks, which stays in the saved file as ``Output()``. Here a notebook
    shows plain HTML, emptied at the end; nothing at all when the work is quick, or where the
    environment says ``TTY_INTERACTIVE=0``, as rich itself reads it.
    """

    def __init__(self, *columns: str | ProgressColumn, disable: bool = False) -> None:
        self._notebook = Console().is_jupyter
        self._handle: Any = None
        self._due = time.monotonic() + PATIENCE
        if self._notebook:
            self._page = Console(file=StringIO(), force_jupyter=False, width=80, record=True)
            silent = disable or os.environ.get("TTY_INTERACTIVE") == "0"
            super().__init__(*columns, console=self._page, auto_refresh=False, disable=silent)
        else:
            super().__init__(*columns, transient=True, disable=disable)

    def start(self) -> None:
        if not self._notebook:
            super().start()

    def stop(self) -> None:
        if not self._notebook:
            super().stop()
        elif self._handle is not None:
            self._handle.update({}, raw=True)
            self._handle = None

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._show()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self._notebook or self.disable or now < self._due:
            return
        self._due = now + PAUSE
        from IPython.display import display

        self._page.print(self.get_renderable())
        text = html.escape(self._page.export_text().rstrip())
        shown = {"text/html": f"<pre>{text}</pre>", "text/plain": ""}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
