"""What the examples in docstrings start from: the lines of lenskit's own docstring, run once."""

from __future__ import annotations

from doctest import DocTestParser
from typing import Any

import pytest


@pytest.fixture(scope="session")
def _beginning() -> dict[str, Any]:
    import lenskit

    names: dict[str, Any] = {}
    for example in DocTestParser().get_examples(lenskit.__doc__):
        exec(example.source, names)
    return names


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """Only a docstring asks for the model; tests load their own."""
    if isinstance(request.node, pytest.DoctestItem):
        doctest_namespace.update(request.getfixturevalue("_beginning"))
