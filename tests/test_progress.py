from __future__ import annotations

import nbformat
from nbclient import NotebookClient

WORK = """
import time
from lenskit import _progress
_progress.PATIENCE = {patience}
with _progress.Bars() as bars:
    task = bars.add_task("work", total=3)
    for _ in range(3):
        time.sleep(0.05)
        bars.advance(task)
"""


def outputs(code: str, **options) -> list[dict]:
    cells = [nbformat.v4.new_code_cell(code)]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120, **options)
    return client.execute().cells[0].outputs


def test_a_bar_leaves_nothing_in_a_saved_notebook():
    assert outputs(WORK.format(patience=60)) == []
    quiet = "import os; os.environ['TTY_INTERACTIVE'] = '0'"
    assert outputs(quiet + WORK.format(patience=0)) == []


def test_a_bar_that_was_shown_is_emptied():
    (left,) = outputs(WORK.format(patience=0))
    assert left["data"] == {} and left["metadata"] == {}


def test_an_error_leaves_no_bar_either():
    code = WORK.format(patience=0) + "        1 / 0\n"
    left, error = outputs(code, allow_errors=True)
    assert left["data"] == {} and error["ename"] == "ZeroDivisionError"
