"""A bias of its own for every head equals that many edits of one head each."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import lenskit as lk
from lenskit.models import chat_ids

pytestmark = pytest.mark.usefixtures("nothing_left_on")

INSTRUCTION = "Answer in one word."
QUESTIONS = [f"{INSTRUCTION} What is rain?", f"Rain? {INSTRUCTION} Why?"]


def drawn(seed):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def spans_of(model):
    return [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]


def logits(model):
    tokens = chat_ids(model, [[{"role": "user", "content": each}] for each in QUESTIONS])
    with torch.no_grad():
        return model(tokens.input_ids, attention_mask=tokens.attention_mask)[:, -1]


def test_every_head_has_its_own_bias_in_the_span_and_outside_but_for_the_first_token(model):
    inside, outside, spans = drawn(0), drawn(1), spans_of(model)
    with ExitStack() as stack:
        for block in range(3):
            for head in range(4):
                one = lk.Heads({block: [head]})
                b, c = float(inside[block, head]), float(outside[block, head])

                def policy(view, b=b, c=c):
                    return b * view.span + c * (view.prompt & ~view.span)

                edit = lk.attend(model, spans, policy, heads=one, protect_bos=True)
                stack.enter_context(edit)
        wanted = logits(model)
    with lk.attend(model, spans, lk.HeadBias(inside, outside)):
        found = logits(model)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, logits(model), atol=1e-3)


def test_without_numbers_nothing_changes_and_answers_are_the_same_in_any_batch(model):
    plain, spans = logits(model), spans_of(model)
    with lk.attend(model, spans, lk.HeadBias(torch.zeros(3, 4))):
        torch.testing.assert_close(logits(model), plain)
    policy = lk.HeadBias(drawn(2))
    with lk.attend(model, spans, policy):
        both = lk.generate(model, QUESTIONS, max_new_tokens=6)
    for question, span, answer in zip(QUESTIONS, spans, both, strict=True):
        with lk.attend(model, span, policy):
            assert lk.generate(model, question, max_new_tokens=6) == answer


@pytest.mark.parametrize("given", [torch.zeros(4), torch.full((3, 4), torch.nan)])
def test_what_is_no_number_for_each_head_is_refused(given):
    with pytest.raises(ValueError, match="inside must"):
        lk.HeadBias(given)
    with pytest.raises(ValueError, match=r"outside must be \[block, head\]"):
        lk.HeadBias(torch.zeros(3, 4), torch.zeros(3, 5))
