"""Weights, soft prompts and vectors learn the targets, and leave the model as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from emphasised import task
from steered import nothing_left

import lenskit as lk
from lenskit.emphasis.adaptations import adapted_loss
from lenskit.emphasis.soft import SoftPrompt, inserted
from lenskit.models import chat_ids

OWN = task("What falls?", "And what is that on the window?")
LEARNT = {
    "fine_tune": partial(lk.emphasis.fine_tune, rate=1e-3),
    "low_rank": partial(lk.emphasis.low_rank, rank=2),
    "rank_one": partial(lk.emphasis.rank_one, rate=1.0),
    "soft_prompt": partial(lk.emphasis.soft_prompt, length=3, rate=0.2),
    "steering_vectors": partial(lk.emphasis.steering_vectors, rate=0.2),
}


@pytest.fixture(autouse=True)
def _nothing_is_left(model):
    named = dict(model.original_model.named_parameters())
    before = {
        name: (weight.detach().clone(), weight.requires_grad) for name, weight in named.items()
    }
    with nothing_left(model):
        yield
    for name, weight in named.items():
        assert torch.equal(weight, before[name][0]) and weight.requires_grad == before[name][1]
        assert weight.grad is None


@pytest.mark.parametrize("name", LEARNT)
def test_what_is_learnt_lowers_the_loss_where_it_is_at_work_and_nowhere_else(model, name):
    plain = adapted_loss(model, None, OWN.prompts)
    found = LEARNT[name](model, OWN, steps=8, number=2)
    assert found.parameters > 0 and len(found.losses) == 8
    assert adapted_loss(model, found, OWN.prompts) < plain - 0.01
    assert adapted_loss(model, None, OWN.prompts) == plain
    assert LEARNT[name](model, OWN, steps=8, number=2).losses == found.losses


def test_changes_are_of_the_rank_that_they_are_called_by(model):
    (delta,) = lk.emphasis.rank_one(model, OWN, block=0, steps=2, number=1).deltas.values()
    assert torch.linalg.matrix_rank(delta) == 1
    low = lk.emphasis.low_rank(model, OWN, rank=2, steps=2, number=1)
    assert {int(torch.linalg.matrix_rank(each)) for each in low.deltas.values()} <= {0, 1, 2}
    assert low.parameters == sum(2 * sum(each.shape) for each in low.deltas.values())


def test_weights_are_bit_for_bit_the_same_after_an_exception(model):
    found = lk.emphasis.low_rank(model, OWN, steps=1, number=1)
    with pytest.raises(KeyboardInterrupt), found.inside(model):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no weight 'nothing'"):
        with lk.emphasis.changed_weights(model, {"nothing": torch.zeros(1)}):
            pass

    def broken(*args):
        raise OSError

    broken_task = [OWN, task("Why?", name="two")]
    object.__setattr__(broken_task[1].prompts[0], "target", "")
    with pytest.raises(Exception):  # noqa: B017
        lk.emphasis.fine_tune(model, broken_task + [broken], steps=3, number=3)


def test_a_soft_prompt_stands_where_its_placeholders_stand(model):
    learnt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    soft = SoftPrompt.of(model, learnt)
    prompt = inserted(OWN.prompts[0], soft.text)
    tokens = chat_ids(model, [prompt.messages])
    ids = tokens.input_ids[0]
    places = (ids == soft.token).nonzero()[:, 0]
    assert len(places) == 3
    embedding = model.original_model.get_input_embeddings()
    seen = []
    with soft.inside(model), torch.no_grad():
        handle = embedding.register_forward_hook(lambda module, args, out: seen.append(out))
        model(tokens.input_ids)
        handle.remove()
    plain = embedding(tokens.input_ids)[0]
    torch.testing.assert_close(seen[0][0, places], learnt)
    others = ids != soft.token
    torch.testing.assert_close(seen[0][0, others], plain[others])
    with pytest.raises(ValueError, match="no prompt held the placeholders"), soft.inside(model):
        lk.generate(model, "Why?", max_new_tokens=2)
