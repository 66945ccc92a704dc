from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.test_fused import FUSED, assert_close, both, loaded

from lenskit.capture import capture, for_each_pattern
from lenskit.concepts import concepts
from lenskit.models import Tokens, fused, pad_left, starts, tokens_run
from lenskit.models.starts import batches, common_start, left_aligned, worth_sharing
from lenskit.prompts import build_prompts

BEGINNING = list(range(10, 30))


@pytest.fixture
def shared(monkeypatch):
    """How many tokens each batch shared."""
    numbers = []

    def spy(*arguments):
        numbers.append(worth_sharing(*arguments))
        return numbers[-1]

    monkeypatch.setattr(fused, "worth_sharing", spy)
    return numbers


def assert_same(eager, quick):
    """As ``assert_close``, also where the prefix is out of sight from a narrow window."""
    largest = float(eager.resid_post.abs().max())
    torch.testing.assert_close(quick.resid_post, eager.resid_post, atol=1e-5 * largest, rtol=0)
    masses = quick.attention_to_prefix, eager.attention_to_prefix
    torch.testing.assert_close(*masses, atol=1e-5, rtol=0)


def spiders(model, number=40):
    return build_prompts(model, concepts["fears"]["spiders"], number=number)


@pytest.mark.parametrize("architecture", FUSED)
def test_what_prompts_begin_with_is_run_once_and_the_capture_is_that_of_eager(architecture, shared):
    model = tiny.shared_model(architecture)
    prompts = spiders(model)
    assert_same(*both(model, prompts, batch_size=16))
    assert len(shared) == 4 and min(shared) >= starts.FEWEST
    # Prompts with the prefix share more than those without.
    assert max(shared) >= min(shared) + 8


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2", "gpt2"])
def test_patterns_of_prompts_that_begin_alike_are_those_of_eager(architecture, shared):
    model = tiny.shared_model(architecture)
    prompts = spiders(model, 32)
    seen: dict[str, dict] = {"eager": {}, "fused": {}}
    for attention, own in seen.items():

        def visit(layer, index, pattern, mask, own=own):
            for row, values in zip(index.tolist(), pattern, strict=True):
                own[layer, row] = values.clone()

        for_each_pattern(model, prompts.tokens, 5, visit, attention=attention, progress=False)
    assert any(shared)
    for key, values in seen["eager"].items():
        torch.testing.assert_close(seen["fused"][key], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [4, 12, 20, 200])
def test_a_window_hides_the_same_tokens_of_what_is_shared(window, tmp_path, shared):
    model = loaded(tmp_path, "mistral-window", sliding_window=window)
    assert_same(*both(model, spiders(model), batch_size=16))
    assert any(shared)


def test_half_precision_shares_too(tmp_path, shared):
    model = loaded(tmp_path, dtype=torch.bfloat16)
    assert_close(*both(model, spiders(model), batch_size=16), tolerance=0.05)
    assert any(shared)


def test_batches_do_not_change_a_capture_by_what_they_share():
    model = tiny.shared_model()
    prompts = spiders(model)
    whole = capture(model, prompts, progress=False)
    for batch_size in (1, 3, 7):
        part = capture(model, prompts, batch_size=batch_size, progress=False)
        torch.testing.assert_close(part.resid_post, whole.resid_post, atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_share_is_read_without(monkeypatch, shared):
    model = loaded_once(monkeypatch)
    eager, quick = both(model, spiders(model), batch_size=16)
    assert_close(eager, quick)
    assert shared == []


def loaded_once(monkeypatch):
    """A model whose trial of a shared start goes wrong."""
    model = tiny.shared_model("llama")
    monkeypatch.setattr(fused, "_verdicts", type(fused._verdicts)())

    def broken(*arguments):
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr(fused, "_start", broken)
    return model


def test_a_start_is_what_all_rows_begin_with_and_no_more_than_the_limit():
    tokens = pad_left([[*BEGINNING, 1, 2, 3], [*BEGINNING, 1, 5], [*BEGINNING, 4, 5, 6, 7]], 0)
    ids = left_aligned(tokens)
    assert ids[1].tolist() == [*BEGINNING, 1, 5, 0, 0]
    assert common_start(ids, 24) == len(BEGINNING)
    assert common_start(ids[:2], 24) == len(BEGINNING) + 1
    assert common_start(ids, 7) == 7 and common_start(ids, 0) == 0


def test_short_starts_and_single_prompts_are_not_worth_a_pass():
    alike = torch.tensor([BEGINNING, [*BEGINNING[:10], *range(10)]])
    assert worth_sharing(alike, 20) == 10
    assert worth_sharing(alike, starts.FEWEST - 1) == 0
    assert worth_sharing(alike[:1], 20) == 0
    long = torch.cat([alike, torch.arange(60).view(2, 30)], dim=1)
    assert worth_sharing(long, 20) == 0


def test_prompts_that_begin_alike_are_in_one_batch():
    other = [token + 100 for token in BEGINNING]
    rows = [[*(BEGINNING if i % 2 else other), *range(i % 5), 7] for i in range(64)]
    for batch in batches(pad_left(rows, 0), 16):
        assert len({int(row) % 2 for row in batch}) == 1
        assert len(batch) == 16


def test_tokens_run_counts_what_is_shared_once_a_batch():
    tokens = pad_left([[*BEGINNING, i, 7] for i in range(40)], 0)
    assert tokens_run(tokens, 20, 2, shared=False) == 40 * 22
    assert tokens_run(tokens, 20, 2, shared=True) == 2 * (20 + 20 * 2)
    assert tokens_run(tokens, 20, 10, shared=True) == 2 * (12 + 20 * 10)


@given(
    rows=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_prompt_once_the_longest_first(rows, batch_size):
    tokens: Tokens = pad_left(rows, 0)
    found = batches(tokens, batch_size)
    assert sorted(torch.cat(found).tolist()) == list(range(len(rows)))
    assert all(1 <= len(batch) <= batch_size for batch in found)
    longest = [int(tokens.lengths[batch].max()) for batch in found]
    assert longest == sorted(longest, reverse=True)
