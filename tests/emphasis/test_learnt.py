"""A bias for every head is learnt from targets, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from emphasised import task
from steered import nothing_left

import lenskit as lk
from lenskit.emphasis.targets import drawn, target_losses, with_targets


@pytest.fixture(autouse=True)
def _nothing_is_left(model):
    before = [weight.clone() for weight in model.original_model.parameters()]
    with nothing_left(model):
        yield
    for weight, was in zip(model.original_model.parameters(), before, strict=True):
        assert torch.equal(weight, was)


def loss(model, prompts, policy):
    spans = [lk.tasks.emphasised_span(model, prompt) for prompt in prompts]
    with torch.no_grad(), lk.attend(model, spans, policy):
        return float(target_losses(model, prompts).mean())


def test_the_loss_falls_on_the_prompts_it_was_learnt_on(model):
    own = task("What falls?", "And what is that on the window?")
    bias = lk.emphasis.learn_head_bias(model, own, steps=12, number=2)
    plain = lk.HeadBias(torch.zeros(3, 4))
    assert loss(model, own.prompts, bias) < loss(model, own.prompts, plain) - 0.05
    again = lk.emphasis.learn_head_bias(model, own, steps=12, number=2)
    assert torch.equal(again.inside, bias.inside) and torch.equal(again.outside, bias.outside)
    strict = lk.emphasis.learn_head_bias(model, own, steps=12, number=2, decay=10.0)
    assert strict.inside.abs().sum() < bias.inside.abs().sum() / 2
    alone = lk.emphasis.learn_head_bias(model, own, steps=1, number=1, outside=False)
    assert alone.outside is None


def test_the_loss_is_that_of_the_targets_tokens_and_the_end(model):
    own = task("What falls?", "And what is that on the window, if it is not the snow?")
    found = target_losses(model, own.prompts).detach()
    for prompt, value in zip(own.prompts, found.tolist(), strict=True):
        tokens, wanted = with_targets(model, [prompt])
        with torch.no_grad():
            logits = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        logits = logits.log_softmax(-1)
        places = wanted[0].nonzero()[:, 0]
        assert tokens.input_ids[0, -1] == model.tokenizer.eos_token_id
        said = [-float(logits[place - 1, tokens.input_ids[0, place]]) for place in places]
        assert value == pytest.approx(sum(said) / len(said), rel=1e-4)


def test_tasks_take_turns_and_each_prompt_is_drawn_before_any_is_again():
    tasks = [task("a", "b", "c"), task("d", name="two")]
    steps = list(drawn(tasks, 3, 2, seed=0))
    assert [len(step) for step in steps] == [2, 2, 2]
    first = [step[0].messages[0]["content"] for step in steps]
    assert len(set(first)) == 3 and all(step[1].messages[0]["content"][-1] == "d" for step in steps)
    with pytest.raises(ValueError, match="tasks is empty"):
        list(drawn([], 1, 1, 0))


def test_what_cannot_be_meant_is_refused(model):
    own = task("What falls?")
    with pytest.raises(ValueError, match="decay must be"):
        lk.emphasis.learn_head_bias(model, own, decay=-1)
    with pytest.raises(ValueError, match="rate must be"):
        lk.emphasis.learn_head_bias(model, own, rate=0)
