"""Steering weakened by plausibility, against the whole text anew for every token and strength."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import tiny
import torch
from steered import own_vectors, plain_hooks, random_vectors

import lenskit as lk
from lenskit.feedback import PlausibleAnswer
from lenskit.models import chat_ids

pytestmark = pytest.mark.usefixtures("nothing_left_on")

INSTRUCTION = "Answer in one word."
QUESTIONS = [
    f"{INSTRUCTION} Why?",
    f"What is the scariest thing in the world? {INSTRUCTION}",
    f"Rain? {INSTRUCTION}",
]
TOKENS, EPSILON = 7, 4.0
FAMILIES = ["llama-gqa", "gpt2", "gemma2", "mistral-window"]
steer = partial(lk.steer, relative=False)


def scale(architecture):
    return 40.0 if architecture == "gemma2" else EPSILON


def edits_of(model, kind, architecture="llama-gqa"):
    if kind == "vectors":
        return steer(model, random_vectors(model), coefficient=scale(architecture))
    if kind == "closing":
        return steer(model, own_vectors(model), coefficient=3 * scale(architecture))
    spans = [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]
    return lk.attend(model, spans, lk.InstABoost(50.0))


@pytest.mark.parametrize("kind", ["vectors", "closing", "attention"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_threshold_0_is_plain_steering_and_threshold_1_the_unsteered_model(architecture, kind):
    model = tiny.shared_model(architecture)
    plain = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    with edits_of(model, kind, architecture):
        steered = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    weakened = partial(lk.generate_plausible, model, QUESTIONS, max_new_tokens=TOKENS)
    edit = partial(edits_of, model, kind, architecture)
    found = weakened(edit(), threshold=0.0)
    assert found == steered != plain
    assert {gain for answer in found for gain in answer.gains} == {1.0}
    found = weakened(edit(), threshold=1.0)
    assert found == plain
    assert [len(each.gains) for each in found] == [
        len(each.token_ids) + each.finished for each in found
    ]


@torch.no_grad()
def reference_weakened(reference, ids, delta, threshold, tries):
    """Greedy tokens and gains of one prompt: no cache, no padding, probabilities as they are."""
    gains, of_token, chosen = [], [], []

    def run(ids, gains):
        column = torch.tensor(gains)[:, None]
        with plain_hooks(reference, {layer: column * row for layer, row in enumerate(delta)}):
            return reference(ids, use_cache=False).logits[0, -1]

    for _ in range(TOKENS):
        new = ids.shape[1] - len(gains)
        chances = reference(ids, use_cache=False).logits[0, -1].softmax(-1)
        for strength in [*(0.5**trial for trial in range(tries)), 0.0]:
            token = int(run(ids, gains + [strength] * new).argmax())
            if chances[token] >= threshold * chances.max():
                break
        token = token if strength else int(chances.argmax())
        gains += [strength] * new
        of_token.append(strength)
        chosen.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return chosen, of_token


@pytest.mark.parametrize("threshold, tries", [(0.5, 4), (0.1, 2), (0.02, 1)])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_padded_cached_batch_is_what_each_text_is_anew(architecture, threshold, tries):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    vectors = random_vectors(model)
    edit = steer(model, vectors, coefficient=scale(architecture))
    answers = lk.generate_plausible(
        model, QUESTIONS, edit, threshold=threshold, tries=tries, max_new_tokens=TOKENS
    )
    delta = scale(architecture) * vectors.directions
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = chat_ids(model, [[{"role": "user", "content": question}]]).input_ids
        tokens, gains = reference_weakened(reference, ids, delta, threshold, tries)
        own = list(answer.token_ids)
        assert own == tokens[: len(own)] and list(answer.gains)[: len(own)] == gains[: len(own)]


def test_strengths_between_nothing_and_all_are_met(model):
    edit = steer(model, random_vectors(model), coefficient=EPSILON)
    answers = lk.generate_plausible(
        model, QUESTIONS, edit, threshold=0.3, tries=4, max_new_tokens=TOKENS
    )
    gains = {gain for answer in answers for gain in answer.gains}
    assert gains <= {1.0, 0.5, 0.25, 0.125, 0.0} and len(gains) > 2


def test_rows_are_independent_and_a_text_alone_gives_one_answer(model):
    vectors, numbers = random_vectors(model), [EPSILON, -EPSILON, 2.0]
    options = {"max_new_tokens": TOKENS, "threshold": 0.2}
    for size in (1, 2, 3):
        edit = steer(model, vectors, coefficient=numbers)
        together = lk.generate_plausible(model, QUESTIONS, edit, batch_size=size, **options)
        for question, number, answer in zip(QUESTIONS, numbers, together, strict=True):
            edit = steer(model, vectors, coefficient=number)
            alone = lk.generate_plausible(model, question, edit, **options)
            assert isinstance(alone, PlausibleAnswer)
            assert (alone.token_ids, alone.gains) == (answer.token_ids, answer.gains)
    copied = pickle.loads(pickle.dumps(alone))
    assert copied == alone and copied.gains == alone.gains


def test_edits_outside_belong_to_the_model_that_judges(model):
    base = partial(steer, model, random_vectors(model, 1), coefficient=EPSILON)
    with base():
        expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
        edit = steer(model, random_vectors(model), coefficient=EPSILON)
        found = lk.generate_plausible(model, QUESTIONS, edit, threshold=1.0, max_new_tokens=TOKENS)
    assert found == expected != lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)


def test_what_cannot_be_meant_is_refused(model):
    edit = partial(steer, model, random_vectors(model), coefficient=EPSILON)
    for words, options in {
        "threshold must be from 0 to 1": {"threshold": 1.5},
        "threshold must be from 0 to 1, got nan": {"threshold": float("nan")},
        "tries must be": {"tries": 0},
        "max_new_tokens must be": {"max_new_tokens": -1},
    }.items():
        with pytest.raises(ValueError, match=words):
            lk.generate_plausible(model, "Why?", edit(), **options)
    with pytest.raises(ValueError, match="there are none"):
        lk.generate_plausible(model, "Why?")
    assert lk.generate_plausible(model, [], edit()) == []
    assert lk.generate_plausible(model, "Why?", edit(), max_new_tokens=0).gains == ()
