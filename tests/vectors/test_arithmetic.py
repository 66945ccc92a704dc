"""Sums and multiples of concept vectors, and tensors in their place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import random_vectors

from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.steering import steer
from lenskit.vectors import Combination

IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 90]])
NUMBERS = st.floats(-8, 8, allow_subnormal=False)


@pytest.fixture(scope="module")
def v(model):
    return random_vectors(model, seed=1)


@pytest.fixture(scope="module")
def w(model):
    return random_vectors(model, seed=2)


@torch.no_grad()
def steered(model, vectors, **options):
    with steer(model, vectors, **options):
        return model(IDS)


def test_the_length_is_the_number_of_blocks_and_an_entry_is_a_blocks_vector(model, v, w):
    assert len(v) == len(2 * v + w) == model.cfg.n_layers
    assert torch.equal(v[1], v.directions[1]) and torch.equal(v[-1], v.directions[-1])
    assert torch.equal(v[:2], v.directions[:2]) and len(list(v)) == len(v)
    torch.testing.assert_close((2 * v - w)[1], 2 * v.directions[1] - w.directions[1])
    with pytest.raises(IndexError):
        v[3]


@settings(max_examples=25, deadline=None)
@given(a=NUMBERS, b=NUMBERS, c=NUMBERS)
def test_arithmetic_is_that_of_the_directions(a, b, c):
    model = tiny.shared_model()
    v, w = random_vectors(model, seed=1), random_vectors(model, seed=2)
    expected = c * (a * v.directions - b * w.directions) + v.directions / 4 - w.directions
    torch.testing.assert_close((c * (v * a - b * w) + v / 4 - w)[:], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal((-v)[:], -v.directions)
    assert torch.equal((v - v)[:], torch.zeros_like(v.directions))


@pytest.mark.parametrize("relative", [True, False])
def test_steering_with_a_multiple_is_steering_with_the_multiple_of_the_coefficient(
    model, v, relative
):
    for number, coefficient in ((2, 0.7), (-1.5, 0.3), (1 / 3, 3)):
        multiple = steered(model, number * v, coefficient=coefficient, relative=relative)
        expected = steered(model, v, coefficient=number * coefficient, relative=relative)
        assert torch.equal(multiple, expected)
    assert torch.equal(
        steered(model, 0.5 * v, relative=relative),
        steered(model, v, coefficient=0.5, relative=relative),
    )


@pytest.mark.parametrize("relative", [True, False])
def test_steering_with_a_sum_is_steering_with_one_inside_the_other(model, v, w, relative):
    with steer(model, v, coefficient=0.4, relative=relative):
        nested = steered(model, w, coefficient=0.4, relative=relative)
        less = steered(model, w, coefficient=-0.2, relative=relative)
    options = {"coefficient": 0.4, "relative": relative}
    torch.testing.assert_close(steered(model, v + w, **options), nested, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(steered(model, v - w / 2, **options), less, atol=1e-5, rtol=1e-6)
    pairs = [(v, 1), (w, -0.5)]
    assert torch.equal(steered(model, v - w / 2, **options), steered(model, pairs, **options))


def test_sums_count_as_vectors_in_pairs_in_rows_and_in_sum_itself(model, v, w):
    whole = steered(model, v + w, coefficient=0.3)
    assert torch.equal(steered(model, [(v + w, 0.3)]), whole)
    assert torch.equal(steered(model, [v + w], coefficient=[0.3]), whole)
    assert torch.equal(steered(model, sum([v, w]), coefficient=0.3), whole)
    questions = ["What is scary?", "And why?"]
    rows = [SteeringRow(questions[0], v + w, 0.3), SteeringRow(questions[1], None, 0.0)]
    answers = generate_steered(model, rows, max_new_tokens=6)
    with steer(model, [v + w, None], coefficient=[0.3, 0.0]):
        assert answers == generate(model, questions, max_new_tokens=6)


def test_the_same_vectors_are_counted_once():
    v = random_vectors(tiny.shared_model())
    assert (v + v - 3 * v).terms == ((v, -1.0),)
    assert 2 * v == v + v and hash(2 * v) == hash(v + v)


def test_numbers_of_every_kind_stand_on_either_side(v):
    for two in (2, 2.0, np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert (two * v).terms == (v * two).terms == ((v, 2.0),)
        assert (v / two).terms == ((v, 0.5),)
    for wrong in ("2", True, None, torch.ones(2), v):
        with pytest.raises(TypeError):
            _ = v * wrong
    for wrong in (1, "w", torch.ones(3, 32)):
        with pytest.raises(TypeError):
            _ = v + wrong


def test_what_cannot_be_added_is_refused(v, w):
    with pytest.raises(ValueError, match="different models"):
        _ = v + replace(w, model="other:0123")
    shorter = {name: getattr(w, name)[:2] for name in ("directions", "validation", "resid_norm")}
    with pytest.raises(ValueError, match=r"numbers of blocks .*\[3, 32\].*\[2, 32\]"):
        _ = v - replace(w, **shorter)
    with pytest.raises(ValueError, match="must be finite"):
        _ = v * float("nan")
    with pytest.raises(ZeroDivisionError):
        _ = v / 0
    with pytest.raises(ValueError, match="at least one"):
        Combination(())


def test_a_tensor_or_an_array_is_added_as_it_is_times_the_coefficient(model, v):
    expected = steered(model, v, coefficient=0.6, relative=False)
    for rows in (v.directions, v.directions.numpy(), v.directions.double().requires_grad_()):
        assert torch.equal(steered(model, rows, coefficient=0.6), expected)
    torch.testing.assert_close(steered(model, 0.6 * v.directions), expected, atol=1e-5, rtol=1e-6)


def test_a_mapping_steers_the_blocks_that_it_names(model, v):
    expected = steered(model, v, coefficient=0.6, relative=False, blocks=[1])
    assert torch.equal(steered(model, {1: v[1]}, coefficient=0.6), expected)
    assert torch.equal(
        steered(model, {1: v[1].numpy(), 2: v[2]}, coefficient=0.6, blocks=[1]), expected
    )


def test_tensors_and_vectors_mix_each_in_its_own_unit(model, v, w):
    with steer(model, v, coefficient=0.1, relative=True):
        nested = steered(model, w, coefficient=2.0, relative=False)
    mixed = steered(model, [(v, 0.1), (w.directions, 2.0)])
    torch.testing.assert_close(mixed, nested, atol=1e-5, rtol=1e-6)


def test_tensors_that_do_not_fit_the_model_are_refused(model, v):
    good = v.directions
    for wrong, error, words in (
        (good[:2], ValueError, r"\[layer, d_model\] = \[3, 32\] for this model, got \[2, 32\]"),
        (good[0], ValueError, r"got \[32\]"),
        (good * float("inf"), ValueError, "finite"),
        (good > 0, ValueError, "real"),
        ({3: good[0]}, ValueError, "vectors has block 3, but the blocks of this model are 0 to 2"),
        ({-1: good[0]}, ValueError, "block -1"),
        ({1.0: good[0]}, TypeError, "1.0 is no whole number"),
        ({1: good}, ValueError, r"vectors\[1\] must be \[d_model\] = \[32\]"),
        ({}, ValueError, "vectors is empty"),
        (
            {2: good[2]},
            ValueError,
            r"given for block\(s\) \[2\], of which blocks=\[0, 1\] has none",
        ),
        (good.tolist(), TypeError, "got list"),
        ("v", TypeError, "got str"),
    ):
        with pytest.raises(error, match=words), steer(model, wrong, coefficient=1.0, blocks=[0, 1]):
            pass
    with pytest.raises(ValueError, match="relative=True needs ConceptVectors"):
        steered(model, good, coefficient=1.0, relative=True)
