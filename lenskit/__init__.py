"""lenskit: find out how a language model carries a concept, and steer it.

``import lenskit as lk`` is cheap: a name is loaded from its module when it is first used. The
public names and their modules are those of ``__init__.pyi``.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

_stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {
    alias.name: str(line.module)
    for line in _stub.body
    if isinstance(line, ast.ImportFrom)
    for alias in line.names
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home == __name__:
        return import_module(f"{home}.{name}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def _version() -> str:
    try:
        return version(__name__)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Importing the module ``lenskit.capture`` must not hide the function ``lenskit.capture``."""

    def __setattr__(self, name: str, value: Any) -> None:
        shared = isinstance(value, ModuleType) and _HOME.get(name) == f"{__name__}.{name}"
        super().__setattr__(name, getattr(value, name) if shared else value)


sys.modules[__name__].__class__ = _Package
