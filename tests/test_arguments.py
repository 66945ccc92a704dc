"""What cannot be meant is refused where it enters, before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from steered import random_vectors
from test_capture import prompts_for

from lenskit._arguments import block_numbers, positive_numbers, whole
from lenskit.capture import capture, for_each_pattern
from lenskit.enrichment import enrich
from lenskit.exchange import to_layers
from lenskit.figures import activation_pca, attention_map, selected_token_map, soft_label_curves
from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.labels import hard_labels, soft_labels
from lenskit.selector import TokenSelection, fixed_token, select_tokens
from lenskit.steering import steer
from lenskit.vectors import Logistic, RecursiveFeatureMachine, Ridge, fit_blocks

NAN = float("nan")
NO_NUMBERS = [1.5, NAN, "1", None, True, np.True_, np.float64(1)]


@pytest.fixture(scope="module")
def captured(model):
    return capture(model, prompts_for(model), progress=False)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_number_that_must_be_whole_is_whole(value):
    with pytest.raises(ValueError, match="draws must be a whole number, 1 or more; got"):
        whole("draws", value, 1)
    with pytest.raises(ValueError, match="blocks must be different numbers from 0 to 2"):
        block_numbers("blocks", [0, value], 3)


def test_numbers_of_numpy_and_torch_are_numbers():
    assert whole("k", np.int32(3), 1) == whole("k", torch.tensor(3), 1) == 3
    assert block_numbers("blocks", np.array([2, 0]), 3) == (2, 0)
    assert block_numbers("blocks", torch.tensor([1]), 3) == (1,)
    assert block_numbers("blocks", (b for b in (1, 2)), 3) == (1, 2)


@pytest.mark.parametrize("blocks", ["12", b"1", "", [0, 0], [1.5], ["1"], [True, False], [], 1])
def test_blocks_that_are_no_list_of_blocks_are_refused_everywhere(model, blocks):
    vectors = random_vectors(model)
    tokens = prompts_for(model).tokens
    uses = (
        lambda: steer(model, vectors, coefficient=1.0, blocks=blocks).__enter__(),
        lambda: to_layers(vectors, blocks=blocks),
        lambda: for_each_pattern(model, tokens, 1, print, progress=False, blocks=blocks),
    )
    for use in uses:
        with pytest.raises(ValueError, match="blocks "):
            use()


@pytest.mark.parametrize("value", [-1, *NO_NUMBERS])
def test_sizes_that_are_no_sizes_are_refused(model, captured, value):
    prompts, tokens = captured.prompts, fixed_token(captured)
    X = torch.randn(1, 20, 4)
    uses = (
        lambda: capture(model, prompts, batch_size=value, progress=False),
        lambda: for_each_pattern(model, prompts.tokens, 1, print, batch_size=value),
        lambda: for_each_pattern(model, prompts.tokens, value, print),
        lambda: generate(model, "Rain?", batch_size=value),
        lambda: generate(model, "Rain?", max_new_tokens=value),
        lambda: enrich(model, prompts, tokens, batch_size=value),
        lambda: enrich(model, prompts, tokens, draws=value),
        lambda: fit_blocks(X, X[0, :, 0], iterations=value),
    )
    for use in uses:
        with pytest.raises(ValueError, match="must be"):
            use()


@pytest.mark.parametrize("value", [NAN, float("inf"), "2", None, [1.0, "a"], (c for c in (1.0,))])
def test_coefficients_that_are_no_numbers_are_refused(model, value):
    pairs = [(random_vectors(model), value)]
    with pytest.raises(ValueError, match="coefficient"), steer(model, pairs):
        pass


def test_the_first_position_is_a_whole_number(model):
    for start in (0.5, NAN, True, "1"):
        with (
            pytest.raises(ValueError, match="start, an absolute position"),
            steer(model, random_vectors(model), coefficient=1.0, start=start),
        ):
            pass


def test_rows_may_come_from_a_generator(model):
    vectors = random_vectors(model)
    rows = [SteeringRow("Rain?", vectors, 9.0), SteeringRow("Is the sun up?", None, 0.0)]
    expected = generate_steered(model, rows, max_new_tokens=3)
    assert generate_steered(model, (row for row in rows), max_new_tokens=3) == expected
    assert len(expected) == 2


def test_one_conversation_that_is_a_mapping_is_refused(model):
    with pytest.raises(TypeError, match="questions is a mapping"):
        generate(model, {"role": "user", "content": "Rain?"})


def test_the_grid_of_a_learner_may_come_from_a_generator_and_is_read_once():
    generator = torch.Generator().manual_seed(2)
    X = 5 * torch.randn(1, 24, 4, generator=generator) * torch.rand(24, 1, generator=generator)
    y = X[0, :, 0].sign() + 0.3 * torch.randn(24, generator=generator)
    expected = fit_blocks(X, y, bandwidths=(1.0, 10.0), scalings=(False, True))
    found = fit_blocks(
        X, y, bandwidths=(b for b in (1.0, 10.0)), scalings=(s for s in (False, True))
    )
    # One of the scaled variants, whose bandwidths come second.
    assert found.settings == expected.settings and found.settings[0].scaled


@pytest.mark.parametrize("values", [[], "1", [NAN], [-1.0], [0.0], [float("inf")], ["a"], 1.0])
def test_a_grid_of_no_numbers_is_refused(values):
    X, y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20.0)
    for learner in (Ridge(values), Logistic(values), RecursiveFeatureMachine(bandwidths=values)):
        with pytest.raises(ValueError, match="must be"):
            learner.fit(X, y, X, y)
    with pytest.raises(ValueError, match="must be"):
        positive_numbers("alphas", values)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda own: replace(own, candidates=tuple(reversed(own.candidates))),
        lambda own: replace(own, candidates=own.candidates[1:], index=own.index - 1),
        lambda own: replace(own, index=own.index[:-1]),
    ],
    ids=["other tokens", "fewer tokens", "fewer blocks"],
)
def test_a_selection_of_another_capture_is_refused_everywhere(model, captured, wrong):
    tokens = fixed_token(captured)
    labels, selection = soft_labels(captured, tokens), wrong(tokens)
    uses = (
        lambda: soft_labels(captured, selection),
        lambda: hard_labels(captured, selection),
        lambda: enrich(model, captured.prompts, selection, progress=False),
        lambda: attention_map(captured, selection),
        lambda: activation_pca(captured, selection, labels, block=0),
        lambda: selected_token_map({"a": tokens, "b": selection}),
    )
    for use in uses:
        with pytest.raises(ValueError, match="candidate"):
            use()


def test_labels_of_another_capture_are_refused(captured):
    tokens = fixed_token(captured)
    labels = soft_labels(captured, tokens)
    for wrong in (labels[1:], labels[:, 1:]):
        with pytest.raises(ValueError, match=r"labels must be \[prompt, layer\]"):
            soft_label_curves(captured, wrong)
        with pytest.raises(ValueError, match=r"labels must be \[prompt, layer\]"):
            activation_pca(captured, tokens, wrong, block=0)


def test_tests_are_not_scored_by_a_selection_for_other_blocks(model, captured):
    found = enrich(model, captured.prompts, fixed_token(captured), alpha=0.05, progress=False)
    for index in ([1, 1], [1, 1, 1, 1]):
        other = replace(found.tokens, index=torch.tensor(index))
        with pytest.raises(ValueError, match="selects among 5 candidates for"):
            replace(found, tokens=other)
    with pytest.raises(ValueError, match="k, a number of blocks"):
        found.top(1.5)


@pytest.mark.parametrize("index", [torch.tensor([0.5, 1.0]), torch.tensor([True, False])])
def test_a_selection_is_of_whole_numbers(index):
    with pytest.raises(ValueError, match="whole numbers"):
        TokenSelection(index, ("a", "b"), "")


def test_vectors_for_another_number_of_blocks_do_not_steer(model):
    vectors = random_vectors(model)
    fewer = replace(
        vectors,
        directions=vectors.directions[1:],
        validation=vectors.validation[1:],
        resid_norm=vectors.resid_norm[1:],
    )
    with (
        pytest.raises(ValueError, match=r"\[layer, d_model\] = \[3, 32\]"),
        steer(model, fewer, coefficient=1.0),
    ):
        pass


def test_prompts_are_picked_by_whole_numbers_or_a_mask(captured):
    for wrong in ([0.5], torch.tensor([1.0]), np.array([0.0, 1.0])):
        with pytest.raises(ValueError, match="rows must be whole numbers or a mask"):
            captured.rows(wrong)
    mask = np.zeros(len(captured), dtype=bool)
    mask[1] = True
    assert len(captured.rows(mask)) == len(captured.rows(np.array([1]))) == 1
    assert len(captured.rows([])) == 0


def test_attention_that_is_no_number_selects_no_token_and_makes_no_label(captured):
    tokens = fixed_token(captured)
    attention = captured.attention_to_prefix.clone()
    attention[0, 1, 2, 3] = NAN
    spoilt = replace(captured, attention_to_prefix=attention)
    for use in (lambda: select_tokens(spoilt), lambda: soft_labels(spoilt, tokens)):
        with pytest.raises(ValueError, match="attention to the prefix is not finite"):
            use()
