"""The benchmark of ``diagnose``: which planted faults count, and how they are counted."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import binomtest
from steered import random_vectors

from benchmarks.diagnosis import STEPS, Planting, counted, interval, only, rightly, turned
from lenskit.concepts import concepts
from lenskit.vectors import ConceptVectors


class Known(Planting):
    """What is shown is given by a function of the vectors' sign, blocks and strength."""

    def fitted(self, token: str) -> ConceptVectors:
        made = random_vectors(tiny.shared_model())
        return replace(made, directions=made.directions.abs(), learner=token)

    enough = 0.3

    def shows(self, vectors: ConceptVectors, coefficient: float) -> float:
        acting = vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        right = bool((vectors.directions >= 0).all()) and vectors.learner in ("attention", "each")
        return float(right and acting != [2] and coefficient < 3)

    def shown(self, ways):
        return [self.shows(own, c) for own, c in ways]

    def curves(self, several):
        return [(1.0, [self.shows(own, c) for c in STEPS]) for own in several]

    class captured:
        candidates = ("a", "b")


def test_each_fault_is_planted_where_it_is_one():
    found = {case.fault: case for case in Known(None, concepts["fears"]["spiders"]).cases()}
    assert set(found) == {"wrong sign", "too much", "wrong block", "wrong token"}
    assert bool((found["wrong sign"].vectors.directions <= 0).all())
    assert found["too much"].coefficient == 6 * 2.0
    assert found["wrong block"].blocks == (2,)
    # Both closing tokens fail, and the first of them is taken in a block that can be steered.
    assert found["wrong token"].blocks == (0,) and found["wrong token"].vectors.learner == "-1"


def test_nothing_is_planted_where_it_would_be_no_fault():
    class Always(Known):
        def shows(self, vectors, coefficient):
            return 1.0

    class Silent(Known):
        enough = 0.01

    concept = concepts["fears"]["spiders"]
    assert not list(Always(None, concept).cases()) and not list(Silent(None, concept).cases())


def test_vectors_are_turned_and_kept_in_blocks():
    own = random_vectors(tiny.shared_model())
    assert torch.equal(turned(own).directions, -own.directions)
    assert only(own, [1]).directions.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_causes_are_counted_with_wilsons_interval():
    cases = pd.DataFrame(
        [("wrong sign", "wrong sign")] * 9 + [("wrong sign", "works"), ("too much", "too much")],
        columns=["fault", "cause"],
    )
    shares = counted(cases).set_index(["way", "cause"])["share"]
    assert shares["wrong sign", "works"] == pytest.approx(0.1)
    row = rightly(cases).set_index("way").loc["wrong sign"]
    expected = binomtest(9, 10).proportion_ci(method="wilson")
    assert (row["mean"], row["concepts"]) == (0.9, 10)
    assert [row["low"], row["high"]] == pytest.approx([expected.low, expected.high], abs=1e-4)
    assert all(end != end for end in interval(0, 0))
