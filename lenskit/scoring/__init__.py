"""Judges of answers, and what they make of a steered model."""

from __future__ import annotations

from lenskit.scoring.grammar import check_grammar_judge, grammar_judge
from lenskit.scoring.interfering import Interference, interference
from lenskit.scoring.intervals import mean_interval
from lenskit.scoring.judges import cohen_kappa, endpoint_judge, likelihood_judge
from lenskit.scoring.own import file_judge
from lenskit.scoring.steerability import (
    Judge,
    Steerability,
    Verdict,
    as_verdict,
    fluency,
    phrase_judge,
    repetition,
    steerability,
)

__all__ = [
    "cohen_kappa",
    "endpoint_judge",
    "likelihood_judge",
    "Interference",
    "Judge",
    "Steerability",
    "Verdict",
    "as_verdict",
    "check_grammar_judge",
    "file_judge",
    "fluency",
    "grammar_judge",
    "interference",
    "mean_interval",
    "phrase_judge",
    "repetition",
    "steerability",
]


def __dir__() -> list[str]:
    return __all__
