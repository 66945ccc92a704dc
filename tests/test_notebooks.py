"""The committed notebooks: run in order, without errors, with outputs, free of machine paths."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

# A path begins where no path, address or base64 text goes on.
MACHINE_PATH = re.compile(
    r"(?<![\w/.+~-])(?:file://)?/(?:work|root|home|tmp|Users|mnt|opt|var|private|content)\b/?[\w.-]*"
    r"|\b[A-Z]:\\+(?:Users|Windows|Temp|Program|home|work)\b|\bC:\\"
)


def problems(notebook: dict[str, Any]) -> list[str]:
    """What is wrong with a notebook (its JSON), in words; an empty list when nothing is."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in cells if "".join(cell["source"]).strip()]
    outputs = [output for cell in cells for output in cell["outputs"]]
    found = []
    counts = [cell["execution_count"] for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not run in order from 1: {counts}")
    if not outputs:
        found.append("no outputs at all")
    for output in outputs:
        if output["output_type"] == "error":
            found.append(f"an error: {output['ename']}: {output['evalue']}")
        data = output.get("data", {"": ""})
        if "application/vnd.jupyter.widget-view+json" in data or not data:
            found.append("a progress bar or widget that needs a kernel")
        described = output.get("metadata", {}).get("image/png", {}).get("alt")
        if "image/png" in data and "text/html" not in data and not described:
            found.append("an image without alternative text")
        page = "".join(data.get("text/html", ""))
        if any('alt="' not in image for image in re.findall(r"<img[^>]*>", page)):
            found.append("an image without alternative text")
    if "widgets" in notebook["metadata"]:
        found.append("the state of widgets")
    for text in texts(notebook):
        if path := MACHINE_PATH.search(text):
            found.append(f"a path of one machine: {path[0]}")
    return found


def texts(node: Any) -> Iterator[str]:
    """Every text of a notebook but its pictures; lines stored as a list are joined."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list) and node and all(isinstance(line, str) for line in node):
        yield "".join(node)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key not in ("image/png", "image/jpeg"):
                yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_is_fit_to_be_read(path):
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []


GOOD: dict[str, Any] = {
    "cells": [
        {"cell_type": "markdown", "source": ["Either/or, see https://example.org/home/page"]},
        {
            "cell_type": "code",
            "source": ["from lenskit import views\n", "print('Q:\\nWhat?')"],
            "execution_count": 1,
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["Q:\n", "What?\n"]}],
        },
        {"cell_type": "code", "source": [], "execution_count": None, "outputs": []},
        {
            "cell_type": "code",
            "source": ["figure"],
            "execution_count": 2,
            "outputs": [
                {
                    "output_type": "display_data",
                    "data": {"image/png": " /tmp/", "text/html": ["<script>atob('aGV/tmp/bG8=')"]},
                    "metadata": {},
                },
                {
                    "output_type": "display_data",
                    "data": {"image/png": "aGVs", "text/plain": "a picture"},
                    "metadata": {"image/png": {"alt": "a picture"}},
                },
            ],
        },
    ],
    "metadata": {},
}


def test_a_good_notebook_has_no_problems():
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    "path",
    [
        f"/{'work'}/project/x.py",
        "saved to /root/x",
        "'/home/someone'",
        "/tmp/ipykernel_1/2.py:3: UserWarning",
        "file:///home/someone",
        "(/Users/someone)",
        "C:\\data",
        "D:\\Users\\someone",
    ],
)
def test_a_machine_path_is_found_in_outputs_sources_and_metadata(path):
    for place in ("outputs", "source", "metadata"):
        notebook = copy.deepcopy(GOOD)
        if place == "outputs":
            notebook["cells"][1]["outputs"][0]["text"] = ["fine\n", path + "\n"]
        elif place == "source":
            notebook["cells"][1]["source"] = [path]
        else:
            notebook["metadata"]["place"] = {"deep": [{"path": path}]}
        assert [problem[:21] for problem in problems(notebook)] == ["a path of one machine"]


def test_an_error_is_found():
    notebook = copy.deepcopy(GOOD)
    notebook["cells"][3]["outputs"] = [
        {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    ]
    assert problems(notebook) == ["an error: ValueError: no"]


@pytest.mark.parametrize("count", [None, 1, 3])
def test_a_cell_run_out_of_order_is_found(count):
    notebook = copy.deepcopy(GOOD)
    notebook["cells"][3]["execution_count"] = count
    assert problems(notebook) == [f"not run in order from 1: [1, {count}]"]


WIDGET = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Output()"}


@pytest.mark.parametrize("data", [WIDGET, {}])
def test_a_saved_progress_bar_is_found(data):
    notebook = copy.deepcopy(GOOD)
    bar = {"output_type": "display_data", "data": data, "metadata": {}}
    notebook["cells"][1]["outputs"].append(bar)
    assert problems(notebook) == ["a progress bar or widget that needs a kernel"]
    notebook = copy.deepcopy(GOOD)
    notebook["metadata"]["widgets"] = {}
    assert problems(notebook) == ["the state of widgets"]


def test_an_image_that_says_nothing_to_those_who_cannot_see_it_is_found():
    for data in ({"image/png": "aGVs"}, {"text/html": "<p><img src='data:,'></p>"}):
        notebook = copy.deepcopy(GOOD)
        image = {"output_type": "display_data", "data": data, "metadata": {}}
        notebook["cells"][1]["outputs"].append(image)
        assert problems(notebook) == ["an image without alternative text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_names_model_concept_and_judge_in_its_first_cell_and_nowhere_else(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first, *rest = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for name in ("MODEL", "CONCEPT", "JUDGE"):
        assert f'{name} = os.environ.get("LENSKIT_{name}"' in first
    assert len(re.findall(r"^\w+ = ", first, re.MULTILINE)) == 3
    # Neither concepts nor blocks are named again.
    assert not re.search(r"load_model\(|lk\.concepts\[|block=\d|blocks=[\[(]\d", "\n".join(rest))


def test_a_notebook_without_outputs_is_found():
    notebook = copy.deepcopy(GOOD)
    for cell in notebook["cells"]:
        cell["outputs"] = []
    assert problems(notebook) == ["no outputs at all"]
