from __future__ import annotations

import pytest
import tiny
import torch
from steered import plain_hooks, random_vectors

from lenskit.concepts import question_prompt
from lenskit.generation import generate
from lenskit.models import chat_ids
from lenskit.study.lift import lift, told

PREFIX = "Take on a cheerful mood."
QUESTIONS = ("Why?", "Where to?")


@pytest.fixture(scope="module")
def model():
    return tiny.shared_model()


@torch.no_grad()
def mean_log_prob(model, questions, answers, added=None) -> float:
    """By Hugging Face alone, one question at a time; each answer counts alike."""
    reference = tiny.reference_model(tiny.shared_folder())
    means = []
    for question, answer in zip(questions, answers, strict=True):
        prompt = chat_ids(model, [[{"role": "user", "content": question}]]).input_ids[0].tolist()
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with plain_hooks(reference, added or {}):
            log_probs = reference(ids).logits[0, :-1].log_softmax(-1)
        own = log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        means.append(float(own.mean()))
    return sum(means) / len(means)


def test_lift_is_the_share_of_what_the_prefix_does_to_its_own_answers(model):
    prefixed = [question_prompt(each, PREFIX) for each in QUESTIONS]
    answers = generate(model, prefixed, max_new_tokens=6)
    found = told(model, PREFIX, QUESTIONS, max_new_tokens=6)
    with_prefix = mean_log_prob(model, prefixed, answers)
    plain = mean_log_prob(model, QUESTIONS, answers)
    assert found.log_prob == pytest.approx(with_prefix, abs=1e-4)
    assert found.plain == pytest.approx(plain, abs=1e-4) and found.answers == tuple(answers)
    vectors = random_vectors(model)
    added = dict(enumerate(0.3 * vectors.resid_norm[:, None] * vectors.directions))
    steered = mean_log_prob(model, QUESTIONS, answers, added)
    lifts = lift(model, found, [vectors, vectors], [0.3, 0.0], relative=True, batch_size=3)
    assert float(lifts[0]) == pytest.approx((steered - plain) / (with_prefix - plain), abs=1e-3)
    assert float(lifts[1]) == pytest.approx(0.0, abs=1e-5)


def test_where_the_prefix_does_nothing_there_is_no_lift(model):
    found = told(model, PREFIX, QUESTIONS, max_new_tokens=3)
    nothing = type(found)(*(list(vars(found).values())[:4]), found.plain, found.plain)
    assert lift(model, nothing, [random_vectors(model)], [0.1]).isnan().all()
    with pytest.raises(ValueError, match="questions is empty"):
        told(model, PREFIX, ())
