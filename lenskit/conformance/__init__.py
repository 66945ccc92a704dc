"""Does everything mean, on a given model, what it says? Named checks against Hugging Face."""

from __future__ import annotations

from lenskit.conformance.checks import Result, check, conformance, read, result_table
from lenskit.conformance.readings import Alone, Readings

__all__ = ["Alone", "Readings", "Result", "check", "conformance", "read", "result_table"]


def __dir__() -> list[str]:
    return __all__
