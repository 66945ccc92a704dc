"""The order of the rooms, and what of a room others may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lenskit"
ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
# Commands, and what benchmarks share.
OPEN = {"lenskit.study.plan", "lenskit.study.demo", "lenskit.study.clock", "lenskit.figures.style"}


def test_no_room_imports_from_one_above_it():
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_a_file_uses_only_what_stands_on_another_rooms_face_and_nothing_private(file):
    home = file.relative_to(PACKAGE).parts[0]
    for line in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(line, ast.ImportFrom) or not str(line.module).startswith("lenskit"):
            continue
        names = [name.name for name in line.names]
        assert not [name for name in names if name.startswith("_") and name != "__version__"]
        _, *path = str(line.module).split(".")
        if {*path[:1]} & (ROOMS - {home, "embedded"}) and line.module not in OPEN:
            assert len(path) == 1, f"{line.module} is inside a room; import from lenskit.{path[0]}"
