"""The logits after prompts that begin alike, against the plain pass, on every architecture."""

from __future__ import annotations

import pytest
import tiny
import torch
from models.test_fused import FUSED, loaded

from lenskit.concepts import concepts
from lenskit.models import hooked, next_logits, next_tokens, run_plain, starts
from lenskit.prompts import build_prompts


@pytest.fixture
def shared(monkeypatch):
    """How many tokens each batch shared."""
    numbers = []
    own = next_tokens._shared

    def spy(model, tokens, number):
        numbers.append(number)
        return own(model, tokens, number)

    monkeypatch.setattr(next_tokens, "_shared", spy)
    return numbers


def spiders(model, number=24):
    prompts = build_prompts(model, concepts["fears"]["spiders"], number=number)
    return prompts.rows(prompts.has_prefix).tokens


def expected(model, tokens):
    return run_plain(model.original_model, tokens.trimmed()).logits[:, -1]


@pytest.mark.parametrize("architecture", FUSED)
def test_sharing_what_prompts_begin_with_leaves_the_logits_as_they_are(architecture, shared):
    model = tiny.shared_model(architecture)
    tokens = spiders(model)
    torch.testing.assert_close(
        next_logits(model, tokens), expected(model, tokens), atol=1e-4, rtol=1e-4
    )
    narrow = ("gemma2", "gemma3", "mistral-window")
    assert bool(shared) == (architecture not in narrow)
    assert all(number >= starts.FEWEST for number in shared[1:])


@pytest.mark.parametrize("window", [4, 12, 20, 200])
def test_a_window_hides_the_same_tokens(window, tmp_path, shared):
    model = loaded(tmp_path, "mistral-window", sliding_window=window)
    tokens = spiders(model)
    torch.testing.assert_close(
        next_logits(model, tokens), expected(model, tokens), atol=1e-4, rtol=1e-4
    )
    assert bool(shared) == (window == 200)


def test_prompts_that_begin_otherwise_or_a_hooked_model_are_run_plainly(shared):
    model = tiny.shared_model()
    tokens = spiders(model)
    other = tokens.rows([0, 1])
    other.input_ids[1, -int(other.lengths[1])] += 1
    next_logits(model, tokens)
    del shared[:]
    torch.testing.assert_close(next_logits(model, other), expected(model, other))
    changed = lambda value, hook: value + 1  # noqa: E731
    with hooked(model, [("blocks.0.hook_resid_post", changed)]):
        found = next_logits(model, tokens)
        torch.testing.assert_close(found, expected(model, tokens))
    assert shared == [] and not torch.allclose(found, next_logits(model, tokens))


def test_a_model_that_cannot_share_is_run_plainly(monkeypatch):
    model = tiny.shared_model("llama")
    monkeypatch.setattr(next_tokens, "_verdicts", type(next_tokens._verdicts)())

    def broken(*arguments):
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr(next_tokens, "_shared", broken)
    tokens = spiders(model)
    torch.testing.assert_close(next_logits(model, tokens), expected(model, tokens))
