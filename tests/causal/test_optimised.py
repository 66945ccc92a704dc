"""Optimised vectors: gradient descent on answers, the weights untouched."""

from __future__ import annotations

import pytest
import tiny
import torch
from steered import plain_hooks

import lenskit as lk

PAIRS = [("Why?", "Rain is wet."), ("Who?", "Maps are old and tea is hot.")]


@pytest.fixture
def model():
    return tiny.shared_model()


def loss_of(model, added: dict, pairs) -> float:
    """Mean loss of the answers' tokens and end tokens by Hugging Face alone."""
    reference = tiny.reference_model(tiny.shared_folder())
    total, number = 0.0, 0
    for question, answer in pairs:
        prompt = lk.chat_ids(model, [[{"role": "user", "content": question}]]).input_ids[0]
        said = [*model.tokenizer(answer, add_special_tokens=False)["input_ids"], 4]
        ids = torch.tensor([[*prompt.tolist(), *said]])
        with torch.no_grad(), plain_hooks(reference, added):
            log_probs = reference(ids).logits[0, :-1].log_softmax(-1)
        own = log_probs.gather(1, ids[0, 1:, None])[-len(said) :, 0]
        total, number = total - float(own.sum()), number + len(said)
    return total / number


def test_the_loss_is_that_of_the_answers_and_falls(model):
    norms = torch.full((3,), 5.0)
    first = lk.causal.optimise(model, PAIRS, norms, blocks=[0, 2], steps=1)
    plain = loss_of(model, {}, PAIRS)
    assert first.losses.tolist() == pytest.approx([plain, plain], rel=1e-4)
    found = lk.causal.optimise(model, PAIRS, norms, blocks=[0, 2], steps=25)
    for block, direction in zip(found.blocks, found.directions, strict=True):
        assert loss_of(model, {block: direction}, PAIRS) < plain - 0.5


def test_each_block_is_optimised_as_if_alone_and_the_weights_stay(model):
    weights = {name: w.clone() for name, w in model.original_model.named_parameters()}
    norms = torch.full((3,), 5.0)
    both = lk.causal.optimise(model, PAIRS, norms, blocks=[0, 1], steps=4, number=1, seed=3)
    alone = lk.causal.optimise(model, PAIRS, norms, blocks=[1], steps=4, number=1, seed=3)
    torch.testing.assert_close(both.directions[1:], alone.directions, atol=1e-4, rtol=1e-3)
    for name, weight in model.original_model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None


def test_pairs_may_be_drawn_by_a_function_and_must_be_there(model):
    drawn = lk.causal.optimise(
        model, lambda random: random.sample(PAIRS, 2), torch.ones(3), blocks=[1], steps=2
    )
    assert drawn.directions.shape == (1, 32) and "losses" in repr(drawn)
    with pytest.raises(ValueError, match="pairs is empty"):
        lk.causal.optimise(model, [], torch.ones(3))
    with pytest.raises(ValueError, match="blocks must be"):
        lk.causal.optimise(model, PAIRS, torch.ones(3), blocks=[7])
