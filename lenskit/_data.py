"""Where the project's data lies: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """Path of a file or folder under ``data/``.

    Raises FileNotFoundError when it is in neither of the two places.
    """
    places = (_PACKAGE / "data", _PACKAGE.parent / "data")
    for place in places:
        if (path := place.joinpath(*parts)).exists():
            return path
    raise FileNotFoundError(
        f"{'/'.join(parts)!r} is not among lenskit's data (looked in "
        f"{', '.join(map(str, places))}); is the installation complete?"
    )
