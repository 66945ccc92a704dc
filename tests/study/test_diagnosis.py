"""Causes named from signatures: the lifts are given, so that every case is met exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from steered import random_vectors

from lenskit.study import diagnosis
from lenskit.study.diagnosis import diagnose
from lenskit.study.divergence import Calibration
from lenskit.study.lift import Told

QUESTIONS = ("Who?", "Why?", "Where to?")


@pytest.fixture
def vectors():
    found = random_vectors(tiny.shared_model())
    return replace(found, concept=replace(found.concept, questions=QUESTIONS))


@pytest.fixture
def seen(monkeypatch):
    """Lifts as a function of vectors and coefficient; the calibrated coefficient is 1."""
    own: dict = {"gap": 1.0, "lift": lambda vectors, coefficient: 0.0}

    def told(model, prefix, questions, **options):
        return Told(prefix, ("",), ((1,),), None, own["gap"], 0.0)

    def lift(model, answers, several, coefficients, **options):
        pairs = zip(several, coefficients, strict=True)
        return torch.tensor([own["lift"](v, c) for v, c in pairs], dtype=torch.float64)

    monkeypatch.setattr(diagnosis, "told", told)
    monkeypatch.setattr(diagnosis, "lift", lift)
    monkeypatch.setattr(diagnosis, "unsteered", lambda *given, **options: None)

    def calibrate(model, several, *given, **options):
        return [Calibration(1.0, 0.5)] * len(several)

    monkeypatch.setattr(diagnosis, "calibrate", calibrate)
    monkeypatch.setattr(
        diagnosis, "divergence", lambda model, base, several, c, **o: torch.tensor(c).abs()
    )
    return own


def peak(coefficient: float) -> float:
    """Highest at 1, and gone from 3 on."""
    return 1 - abs(coefficient - 1) / 2 if coefficient > 0 else -0.5


@pytest.mark.parametrize(
    ("coefficient", "cause"),
    [
        (None, "works"),
        (1.0, "works"),
        (6.0, "too much"),
        (0.01, "too little"),
        (-1.0, "wrong sign"),
    ],
)
def test_of_a_good_direction_the_coefficient_is_judged(seen, vectors, coefficient, cause):
    seen["lift"] = lambda vectors, c: peak(c) if c >= 0.25 or c < 0 else 0.1
    found = diagnose(tiny.shared_model(), vectors, coefficient)
    assert found.cause == cause and found.coefficients == (0.25, 2.0)
    assert "coefficients to try" in repr(found) and cause in repr(found)


def test_a_vector_of_the_wrong_sign_is_to_be_used_negatively(seen, vectors):
    seen["lift"] = lambda vectors, c: peak(-c)
    found = diagnose(tiny.shared_model(), vectors, 1.0)
    assert found.cause == "wrong sign" and found.coefficients == (-2.0, -0.25)
    assert diagnose(tiny.shared_model(), vectors, -1.0).cause == "works"
    assert diagnose(tiny.shared_model(), vectors, -9.0).cause == "too much"


def test_what_vectors_fitted_anew_do_tells_a_wrong_token_from_a_wrong_block(seen, vectors):
    def lifts(good: set[int]):
        def of(given, coefficient):
            acting = set(given.directions.any(dim=1).nonzero()[:, 0].tolist())
            fitted = given.learner != "random"
            return peak(coefficient) if fitted and acting & good else 0.05

        return of

    seen["lift"] = lifts({0, 1, 2})
    found = diagnose(tiny.shared_model(), vectors, 1.0, blocks=[2], prompts=8)
    assert found.cause == "wrong token" and found.reference["same blocks"] == 1.0
    seen["lift"] = lifts({0})
    found = diagnose(tiny.shared_model(), vectors, 1.0, blocks=[2], prompts=8)
    assert found.cause == "wrong block" and 0 in found.blocks
    seen["lift"] = lifts(set())
    found = diagnose(tiny.shared_model(), vectors, 1.0, blocks=[2], prompts=8)
    assert found.cause == "unknown" and found.coefficients is None and found.blocks is None


def test_a_prefix_that_does_nothing_is_the_cause_itself(seen, vectors):
    seen["gap"] = 0.01
    assert diagnose(tiny.shared_model(), vectors, 1.0).cause == "weak prefix"


def test_arguments_that_cannot_be_meant_are_named(vectors):
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="coefficient must be finite"):
        diagnose(model, vectors, float("nan"))
    nothing = replace(vectors, directions=torch.zeros_like(vectors.directions))
    with pytest.raises(ValueError, match="steer nothing"):
        diagnose(model, nothing)
    with pytest.raises(ValueError, match="were made with model"):
        diagnose(model, replace(vectors, model="other:0123"))
