"""The built wheel is complete: it works away from the checkout, with its data inside."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# Runs with -I -S, so that neither the environment, nor the working directory, nor a .pth file of
# an editable installation brings the checkout back.
PREAMBLE = """
import sys
target, *libraries = sys.argv[1:]
sys.argv[1:] = []
sys.path[:0] = [target]
sys.path += libraries
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, CHECKOUT)
    (built,) = folder.glob("lenskit-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


def test_the_wheel_holds_every_module_and_all_data_but_no_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(CHECKOUT) for path in (CHECKOUT / "lenskit").rglob("*.py")}
    data = {path.relative_to(CHECKOUT) for path in (CHECKOUT / "data").rglob("*")}
    results = {path for path in data if path.is_relative_to("data/results")}
    assert results and not [name for name in names if "/results/" in name]
    data -= results
    expected = {path.as_posix() for path in modules} | {"lenskit/py.typed"}
    expected |= {f"lenskit/{path.as_posix()}" for path in data if (CHECKOUT / path).is_file()}
    assert expected <= names
    (info,) = {name.split("/")[0] for name in names} - {"lenskit"}
    assert f"{info}/licenses/LICENSE" in names


def test_an_installed_wheel_finds_itself_and_its_data_inside_itself(installed, tmp_path):
    code = """
    import lenskit
    from lenskit._data import data_path
    print(lenskit.__file__)
    print(data_path("grammar", "classes.toml"))
    """
    for line in _away(code, installed, tmp_path).splitlines():
        assert Path(line).is_relative_to(installed), line


@pytest.mark.skipif(not (CHECKOUT / "lenskit" / "cli").exists(), reason="there is no lenskit.cli")
def test_the_console_script_of_an_installed_wheel_answers(installed, tmp_path):
    code = """
    from importlib.metadata import distribution
    script = distribution("lenskit").entry_points["lenskit"]
    sys.argv = ["lenskit", "--help"]
    script.load()()
    """
    assert "demo" in _away(code, installed, tmp_path)


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _away(code: str, installed: Path, folder: Path) -> str:
    """What a fresh interpreter prints that cannot see the checkout."""
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    assert str(CHECKOUT) not in libraries
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PREAMBLE + lines, str(installed), *libraries],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
