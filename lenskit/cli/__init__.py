"""The command ``lenskit``: the demonstration, studies and vectors of one's own, and checks."""

from __future__ import annotations

from lenskit.cli import diagnose, emphasis, experiment, figures, more, steer, study
from lenskit.cli.common import app

__all__ = ["app", "diagnose", "emphasis", "experiment", "figures", "more", "steer", "study"]


def __dir__() -> list[str]:
    return __all__
