"""Knocking out edges in one batch equals one forward pass with a plain hook for each of them."""

from __future__ import annotations

import pytest
import tiny
import torch

import lenskit as lk
from lenskit.attention import Span

IDS = [0, 40, 50, 60, 70, 80]
TARGET = [90, 100]


@pytest.fixture
def model():
    return tiny.shared_model()


@torch.no_grad()
def cut(model, block, keys, queries, heads=slice(None), more=TARGET[:-1]):
    """The target's log-probability where a plain hook hides keys from queries."""

    def hide(scores, hook):
        scores = scores.clone()
        for query in queries:
            for key in keys:
                scores[:, heads, query, key] = -torch.inf
        return scores

    hooks = [(f"blocks.{each}.attn.hook_attn_scores", hide) for each in block]
    with model.hooks(fwd_hooks=hooks):
        logits = model(torch.tensor([[*IDS, *more]]))[0, -len(TARGET) :].log_softmax(-1)
    return sum(float(logits[i, token]) for i, token in enumerate(TARGET))


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2", "gpt_neox"])
def test_every_block_and_token_equals_a_forward_pass_of_its_own(architecture):
    model = tiny.shared_model(architecture)
    found = lk.causal.knock_out(model, IDS, target=TARGET, batch_size=7)
    assert found.values.shape == (3, 6) and found.axes == ("block", "pos")
    for block in range(3):
        for key in range(6):
            expected = cut(model, [block], [key], [5, 6])
            assert found.values[block, key].item() == pytest.approx(expected, abs=1e-5)
    assert found.plain == pytest.approx(cut(model, [], [], []), abs=1e-5)


def test_every_head_windows_spans_and_queries(model):
    heads = lk.causal.knock_out(model, IDS, [[1, 2]], target=TARGET, heads=True)
    assert heads.values.shape == (3, 4) and heads.axes == ("block", "head")
    for block in range(3):
        for head in range(4):
            expected = cut(model, [block], [1, 2], [5, 6], heads=head)
            assert heads.values[block, head].item() == pytest.approx(expected, abs=1e-5)

    found = lk.causal.knock_out(
        model, IDS, [[1, 2], -3], target=TARGET, blocks=[[0, 1], [2]], queries="all"
    )
    expected = cut(model, [0, 1], [1, 2], range(1, 7))
    assert found.values[0, 0].item() == pytest.approx(expected, abs=1e-5)
    expected = cut(model, [2], [3], range(3, 7))
    assert found.values[1, 1].item() == pytest.approx(expected, abs=1e-5)

    asking = Span((4,), tuple(IDS))
    found = lk.causal.knock_out(model, IDS, [1], target=TARGET, queries=asking)
    assert found.values[0, 0].item() == pytest.approx(cut(model, [0], [1], [4]), abs=1e-5)


def test_spans_of_text_are_those_of_the_prompt(model):
    question = "What do you fear at night?"
    span = lk.span(model, question, "fear at night")
    found = lk.causal.knock_out(model, question, span, target="spiders")
    assert found.places == (span.positions,) and "fear" in found.names[0]
    same = lk.causal.knock_out(model, question, [span.positions], target="spiders")
    assert torch.equal(found.values, same.values)
    other = lk.span(model, "What do you fear at noon?", "fear")
    with pytest.raises(ValueError, match="of another prompt"):
        lk.causal.knock_out(model, question, other, target="spiders")


def test_what_cannot_be_meant_is_refused(model):
    with pytest.raises(ValueError, match="one span, got 6"):
        lk.causal.knock_out(model, IDS, target=TARGET, heads=True)
    with pytest.raises(ValueError, match="queries must be"):
        lk.causal.knock_out(model, IDS, target=TARGET, queries="first")
    with pytest.raises(ValueError, match="no key"):
        lk.causal.knock_out(model, IDS, [0], target=TARGET, queries="all")
    assert "knock-out" in repr(lk.causal.knock_out(model, IDS, target=TARGET)).lower()
