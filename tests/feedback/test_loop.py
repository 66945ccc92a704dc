"""The law of a closed loop, and what it refuses."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lenskit as lk

number = st.integers(-4, 4).map(float)


def monitor(model):
    raise AssertionError("the law alone needs no model")


def run(loop, readings):
    """What a loop asks for, reading after reading, of one row."""
    before, found = torch.zeros(1), []
    for reading in readings:
        before = loop.asked(torch.tensor([reading]), before)
        found.append(float(before))
    return found


@settings(deadline=None)
@given(readings=st.lists(number, max_size=12), bounds=st.tuples(number, number))
def test_a_thermostat_goes_on_below_low_and_off_at_high(readings, bounds):
    low, high = sorted(bounds)
    on, expected = False, []
    for reading in readings:
        if reading < low:
            on = True
        elif reading >= high:
            on = False
        expected.append(float(on))
    assert run(lk.ClosedLoop(monitor, low, high), readings) == expected
    mirrored = lk.ClosedLoop(monitor, -high, -low, when="above")
    assert run(mirrored, [-reading for reading in readings]) == expected


@settings(deadline=None)
@given(readings=st.lists(number, max_size=12), bounds=st.tuples(number, number))
def test_a_proportional_loop_goes_from_all_at_low_to_nothing_at_high(readings, bounds):
    low, high = min(bounds), max(bounds) + 1.0
    expected = [min(1.0, max(0.0, (high - reading) / (high - low))) for reading in readings]
    found = run(lk.ClosedLoop(monitor, low, high, proportional=True), readings)
    assert found == pytest.approx(expected)
    mirrored = lk.ClosedLoop(monitor, -high, -low, when="above", proportional=True)
    assert run(mirrored, [-reading for reading in readings]) == pytest.approx(expected)


@pytest.mark.parametrize("when", ["below", "above"])
@pytest.mark.parametrize("proportional", [True, False])
def test_a_reading_that_is_not_there_asks_for_nothing_and_rows_have_their_own(when, proportional):
    loop = lk.ClosedLoop(monitor, 1.0, 2.0, when=when, proportional=proportional)
    asked = loop.asked(torch.tensor([nan, 0.0, 9.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert asked.tolist() == [0.0, 1.0, 0.0] if when == "below" else [0.0, 0.0, 1.0]


def test_one_bound_serves_for_both_and_the_table_names_them():
    assert lk.ClosedLoop(monitor, low=2).band == (2.0, 2.0)
    assert lk.ClosedLoop(monitor, high=-inf, when="above").band == (-inf, -inf)
    shown = repr(lk.ClosedLoop(monitor, low=0.5, hold=3))
    assert "low" in shown and "0.5" in shown and "hold" in shown


@pytest.mark.parametrize(
    "words, options",
    [
        ("low and high are missing", {}),
        ("low must not be above high", {"low": 2, "high": 1}),
        ("low must not be above high, and both numbers", {"low": nan}),
        ("high must be a number", {"low": 0, "high": "much"}),
        ("when must be", {"low": 1, "when": "outside"}),
        ("proportional needs", {"low": 1, "proportional": True}),
        ("proportional needs", {"low": -inf, "high": 0, "proportional": True}),
        ("hold must be", {"low": 1, "hold": -1}),
        ("hold must be", {"low": 1, "hold": 0.5}),
    ],
)
def test_a_loop_that_cannot_be_meant_is_refused(words, options):
    with pytest.raises(ValueError, match=words):
        lk.ClosedLoop(monitor, **options)
    with pytest.raises(TypeError, match="monitor must be"):
        lk.ClosedLoop("projection", low=1)
