from __future__ import annotations

import numpy as np
import pytest

from lenskit.scoring import intervals, mean_interval

VALUES = np.random.default_rng(1).random(30)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    low, high = mean_interval(VALUES)
    half = 1.96 * VALUES.std() / np.sqrt(len(VALUES))
    assert (low, high) == pytest.approx((VALUES.mean() - half, VALUES.mean() + half), abs=0.01)


def test_draws_held_in_parts_are_the_same_draws(monkeypatch):
    whole = mean_interval(VALUES, draws=999)
    monkeypatch.setattr(intervals, "_HELD", 31 * 7)
    assert mean_interval(VALUES, draws=999) == whole


def test_a_single_value_has_no_interval_and_limits_are_checked():
    assert np.isnan(mean_interval(VALUES[:1])).all()
    for wrong in ({"level": 1.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="level must be in"):
            mean_interval(VALUES, **wrong)
