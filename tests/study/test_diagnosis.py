"""Causes named from signatures: what is shown is given, so that every case is met exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from steered import random_vectors

from lenskit.generation import SteeringRow
from lenskit.study import diagnosis, probe
from lenskit.study.calibration import Calibration
from lenskit.study.diagnosis import diagnose

QUESTIONS = ("Who?", "Why?", "Where to?")


@pytest.fixture
def vectors():
    found = random_vectors(tiny.shared_model())
    return replace(found, concept=replace(found.concept, questions=QUESTIONS))


@pytest.fixture
def seen(monkeypatch):
    """Which rows show the concept, by a function of them; the calibrated coefficient is 1."""
    own: dict = {"shows": lambda row: False}

    def shown(model, rows, **options):
        return ["yes" if row.prefix or own["shows"](row) else "no" for row in rows]

    def calibrated(model, several, *given, **options):
        return [Calibration(1.0, 0.5)] * len(several)

    monkeypatch.setattr(probe, "generate_steered", shown)
    monkeypatch.setattr(diagnosis, "unsteered", lambda *given, **options: None)
    monkeypatch.setattr(probe, "calibrate", calibrated)
    monkeypatch.setattr(
        probe, "divergence", lambda model, base, several, c, **o: torch.tensor(c).abs()
    )
    return own


def said(vectors, coefficient=None, **options):
    return diagnose(
        tiny.shared_model(),
        vectors,
        coefficient,
        judge=lambda concept, question, answer: answer == "yes",
        prompts=8,
        **options,
    )


@pytest.mark.parametrize(
    ("coefficient", "cause"),
    [
        *((None, "works"), (1.0, "works"), (6.0, "too much"), (0.01, "too little")),
        (-1.0, "wrong sign"),
    ],
)
def test_of_a_good_direction_the_coefficient_is_judged(seen, vectors, coefficient, cause):
    seen["shows"] = lambda row: 0.4 < row.coefficient < 2.5
    found = said(vectors, coefficient)
    assert found.cause == cause and found.coefficients == (0.5, 2.0)
    assert "0.5 to 2" in repr(found) and cause in repr(found)
    tried = found.table.set_index("coefficient")
    assert tried.loc[1.0, "shown"] == 1 and tried.loc[4.0, "unchanged"] == 1
    assert tried.loc[-4.0, "divergence"] == 4


def test_a_vector_of_the_wrong_sign_is_to_be_turned(seen, vectors):
    seen["shows"] = lambda row: -2.5 < row.coefficient < -0.4
    found = said(vectors, 1.0)
    assert found.cause == "wrong sign" and found.coefficients == (-2.0, -0.5)
    assert said(vectors, -1.0).cause == "works" and said(vectors, -9.0).cause == "too much"


def test_what_vectors_fitted_anew_do_tells_a_wrong_token_from_a_wrong_block(seen, vectors):
    def only(good: set[int], token: str):
        def shows(row: SteeringRow) -> bool:
            if row.vectors is None or row.vectors.learner == "random":
                return False
            acting = row.vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
            own = "each" if row.vectors.closing else "attention"
            return own == token and bool(set(acting) & good) and row.coefficient > 0.4

        return shows

    seen["shows"] = only({2}, "attention")
    found = said(vectors, 1.0, blocks=[2])
    assert (found.cause, found.token, found.blocks) == ("wrong token", "attention", (2,))
    assert found.coefficients == (0.5, 2.0)
    seen["shows"] = only({0}, "each")
    found = said(vectors, 1.0, blocks=[2])
    assert (found.cause, found.token) == ("wrong block", "each") and 0 in found.blocks
    assert found.reference["token attention, all blocks"] == 0
    seen["shows"] = only(set(), "each")
    found = said(vectors, 1.0, blocks=[2])
    assert found.cause == "unknown" and found.coefficients is None and found.blocks is None


@pytest.mark.parametrize(
    ("good", "cause"), [({0, 2}, "wrong block"), ({2}, "wrong token"), ({0}, "wrong block")]
)
def test_vectors_that_come_out_the_same_again_are_right_and_the_blocks_are_wrong(
    seen, vectors, monkeypatch, good, cause
):
    def again(made, token, **options):
        same = replace(vectors, learner=token)
        # Nearly the same, as of another draw of prompts.
        return replace(same, directions=same.directions + 0.01 * torch.ones(1))

    monkeypatch.setattr(diagnosis, "fit_vectors", again)

    def shows(row: SteeringRow) -> bool:
        if row.vectors is None or row.vectors.learner != "each" or row.coefficient < 0.4:
            return False
        acting = row.vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        return len(acting) == 1 and set(acting) <= good

    seen["shows"] = shows
    found = said(vectors, 1.0, blocks=[2])
    assert found.cause == cause and found.token == "each"


@pytest.mark.parametrize(
    ("coefficient", "share", "cause"),
    [
        *((1.0, 1 / 3, "wrong block"), (1.0, 1.0, "too much"), (5.0, 1 / 3, "too much")),
        (0.3, 1 / 3, "works"),
    ],
)
def test_a_concept_that_shows_in_part_is_sought_where_it_shows_much_more(
    seen, vectors, coefficient, share, cause
):
    def shows(row: SteeringRow) -> bool:
        if row.vectors is None:
            return False
        if row.vectors.learner != "random":  # fitted anew
            acting = row.vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
            return acting == [0]
        return row.coefficient in (0.25, 0.3, 0.5) and QUESTIONS.index(row.question) < 3 * share

    seen["shows"] = shows
    assert said(vectors, coefficient, blocks=[2]).cause == cause


def test_a_prefix_that_shows_nothing_is_the_cause_itself(seen, vectors):
    found = diagnose(tiny.shared_model(), vectors, 1.0, judge=lambda *given: 0.0)
    assert found.cause == "weak prefix" and found.prompted == 0 and "weak prefix" in repr(found)


def test_arguments_that_cannot_be_meant_are_named(vectors):
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="coefficient must be finite"):
        diagnose(model, vectors, float("nan"))
    nothing = replace(vectors, directions=torch.zeros_like(vectors.directions))
    with pytest.raises(ValueError, match="steer nothing"):
        diagnose(model, nothing)
    with pytest.raises(ValueError, match="were made with model"):
        diagnose(model, replace(vectors, model="other:0123"))
