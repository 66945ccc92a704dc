"""A vector for each closing token is added at that token of the prompt's end, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import families
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import (
    at_the_end,
    hook_count,
    own_vectors,
    plain_hooks,
    random_vectors,
    reference_tokens,
)

from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.models import chat_ids, load_model, pad_left
from lenskit.steering import steer

# What the plain hooks add is absolute.
steer = partial(steer, relative=False)
answers_of = partial(generate_steered, relative=False, max_new_tokens=6)
QUESTIONS = ("What is the scariest thing in the world?", "Why?", "Is rain better than sun?")
TURNS = (
    {"role": "user", "content": QUESTIONS[1]},
    {"role": "assistant", "content": "Rain is better."},
    {"role": "user", "content": QUESTIONS[2]},
)
# Families of tokenizer and template, by the name of their folders; "plain" is a base model.
STYLES = {"plain": "gpt2"} | {name: name for name in ("llama 2", "vicuna", "mistral", "metaspace")}


@cache
def folder(name):
    return families.real_style_folder(STYLES[name]) if name in STYLES else tiny.shared_folder(name)


@cache
def loaded(name="llama-gqa"):
    if name in STYLES:
        return load_model(folder(name), device="cpu", check=False)
    return tiny.shared_model(name)


def ids_of(model, *conversations) -> list[list[int]]:
    given = [
        [{"role": "user", "content": one}] if isinstance(one, str) else one for one in conversations
    ]
    tokens = chat_ids(model, given)
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
    ]


@torch.no_grad()
def passed(model, *rows, **options):
    """Logits of left-padded rows, each without its padding."""
    tokens = pad_left(rows, model.tokenizer.pad_token_id)
    logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, **options)
    return [own[-len(row) :] for own, row in zip(logits, rows, strict=True)]


@torch.no_grad()
def hooked(name, row, own, end=None):
    reference = tiny.reference_model(folder(name))
    with plain_hooks(reference, at_the_end(len(row), own, end)):
        return reference(torch.tensor([row])).logits[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "qwen2", "gemma3", *STYLES])
def test_each_closing_token_gets_its_own_vector_as_by_plain_hooks_on_hugging_face(name):
    model = loaded(name)
    vectors = own_vectors(model)
    rows = ids_of(model, *QUESTIONS)
    with steer(model, vectors, coefficient=4.0):
        found = passed(model, *rows)
    for row, logits in zip(rows, found, strict=True):
        assert tuple(row[-len(vectors.closing) :]) == vectors.closing
        close(logits, hooked(name, row, 4.0 * vectors.directions))
        assert (logits[-1] - passed(model, row)[0][-1]).abs().max() > 0.1


def test_before_the_closing_tokens_nothing_changes_and_the_chosen_blocks_alone_are_steered():
    model = loaded()
    vectors = own_vectors(model)
    (row,) = ids_of(model, QUESTIONS[0])
    names = [f"blocks.{i}.hook_resid_post" for i in (0, 1)]
    seen: list = []
    hooks = [(name, lambda value, hook: seen.append(value)) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(torch.tensor([row]))
    # Read by hooks that run after those that steer.
    with (
        torch.no_grad(),
        steer(model, vectors, coefficient=3.0, blocks=[1]),
        model.hooks(fwd_hooks=hooks),
    ):
        model(torch.tensor([row]))
    assert torch.equal(seen[2], seen[0])
    expected = seen[1].clone()
    expected[:, -len(vectors.closing) :] += 3.0 * vectors.directions[1]
    assert torch.equal(seen[3], expected)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "llama 2", "vicuna"])
def test_of_a_conversation_only_the_last_turn_is_steered_and_not_the_answer(name):
    model = loaded(name)
    vectors = own_vectors(model)
    own = 3.0 * vectors.directions
    (prompt,) = ids_of(model, TURNS)
    answered = [*prompt, *model.tokenizer("Rain is", add_special_tokens=False)["input_ids"]]
    with steer(model, vectors, coefficient=3.0):
        found = passed(model, prompt, answered)
    close(found[0], hooked(name, prompt, own))
    close(found[1], hooked(name, answered, own, len(prompt)))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "vicuna"])
@pytest.mark.parametrize("start", [0, 25])
def test_rows_of_one_batch_are_generated_as_by_plain_hooks_without_cache_or_padding(name, start):
    model = loaded(name)
    reference = tiny.reference_model(folder(name))
    own, other, plain = own_vectors(model), own_vectors(model, 1), random_vectors(model)
    scale = 40.0 if name == "gemma2" else 4.0
    rows = [
        SteeringRow(QUESTIONS[0], own, scale),
        SteeringRow(QUESTIONS[1], own, -scale),
        SteeringRow(TURNS, other, scale),
        SteeringRow(QUESTIONS[1], None, 0.0),
        SteeringRow(QUESTIONS[2], plain, scale),
        SteeringRow(QUESTIONS[2], own - 0.5 * other + plain / 2, scale, "Be cheerful."),
    ]
    added = [
        (own.directions, None),
        (-own.directions, None),
        (other.directions, None),
        (None, None),
        (None, plain.directions),
        (own.directions - 0.5 * other.directions, plain.directions / 2),
    ]
    answers = answers_of(model, rows, blocks=[0, 2], start=start, batch_size=4)
    for row, (at_end, everywhere), answer in zip(rows, added, answers, strict=True):
        delta = torch.zeros(3, model.cfg.d_model)
        places = torch.zeros(3, len(own.closing), model.cfg.d_model)
        if everywhere is not None:
            delta[[0, 2]] = scale * everywhere[[0, 2]]
        if at_end is not None:
            places[[0, 2]] = scale * at_end[[0, 2]]
        (ids,) = ids_of(model, row.conversation)
        expected = reference_tokens(
            reference,
            ids,
            delta,
            6,
            start=start,
            own=places,
            ends=(model.tokenizer.eos_token_id,) if answer.finished else (),
        )
        assert list(answer.token_ids) == expected[: len(expected) - answer.finished]


def test_answers_are_the_same_with_and_without_a_cache_and_whichever_generate_writes_them():
    model = loaded()
    vectors = own_vectors(model)
    rows = [SteeringRow(question, vectors, 4.0) for question in QUESTIONS]
    expected = answers_of(model, rows)
    tokens = chat_ids(model, [row.conversation for row in rows])
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=tokens.attention_mask)
    with steer(model, vectors, coefficient=4.0):
        assert generate(model, QUESTIONS, max_new_tokens=6) == expected
        for cached in (True, False):
            written = model.original_model.generate(tokens.input_ids, use_cache=cached, **options)
            new = written[:, tokens.input_ids.shape[1] :].tolist()
            for row, answer in zip(new, expected, strict=True):
                assert row[: len(answer.token_ids)] == list(answer.token_ids)


@pytest.mark.parametrize("name", ["plain", "llama-gqa"])
def test_a_turn_that_the_model_writes_itself_is_not_the_prompts_end(name):
    model = loaded(name)
    vectors = own_vectors(model)
    own = 4.0 * vectors.directions
    (prompt,) = ids_of(model, QUESTIONS[1])
    written = ids_of(model, QUESTIONS[2])[0][1:]
    assert tuple(written[-len(vectors.closing) :]) == vectors.closing
    with steer(model, vectors, coefficient=4.0):
        for more in range(len(written) + 1):
            row = prompt + written[:more]
            (uncached,) = passed(model, row)
        close(uncached, hooked(name, row, own, len(prompt)))
        # A text that does not go on from the one before is a prompt of its own.
        close(passed(model, row[1:])[0], hooked(name, row[1:], own))


@torch.no_grad()
def test_from_a_cache_generated_tokens_are_left_alone_and_a_new_turn_is_steered():
    model = loaded()
    vectors = own_vectors(model)
    first, more = ids_of(model, *QUESTIONS[:2])
    second = [*first, 40, 50, 60, *more[1:]]
    hf_model = model.original_model
    own = vectors.directions
    with steer(model, vectors, coefficient=1.0):
        cache, parts = None, []
        cuts = [0, len(first), len(first) + 1, len(first) + 2, len(second)]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            output = hf_model(
                torch.tensor([second[begin:end]]), past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            parts.append(output.logits[0])
    reference = tiny.reference_model(folder("llama-gqa"))
    ends = at_the_end(len(second), own), at_the_end(len(second), own, len(first))
    with plain_hooks(reference, {layer: ends[0][layer] + ends[1][layer] for layer in ends[0]}):
        close(torch.cat(parts), reference(torch.tensor([second])).logits[0])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_row_is_steered_alike_alone_and_in_any_company_with_any_padding(data):
    model = loaded()
    pool = [own_vectors(model), own_vectors(model, 1), random_vectors(model), None]
    texts = st.sampled_from((*QUESTIONS, TURNS))
    number = st.floats(-3, 3, allow_subnormal=False)
    chosen = data.draw(
        st.lists(st.tuples(texts, st.sampled_from(range(4)), number), min_size=1, max_size=4)
    )
    padding = data.draw(st.integers(0, 4))
    start = data.draw(st.sampled_from((0, 20)))
    # Of the closing tokens themselves: masked, they are no end.
    pad = data.draw(st.sampled_from((5, pool[0].closing[-1])))
    ids = ids_of(model, *(text for text, _, _ in chosen))
    tokens = pad_left([*ids, [pad] * (max(map(len, ids)) + padding)], pad)
    vectors = [pool[which] for _, which, _ in chosen]
    numbers = [coefficient for _, _, coefficient in chosen]
    with torch.no_grad(), steer(model, vectors, coefficient=numbers, start=start):
        together = model(tokens.input_ids[:-1], attention_mask=tokens.attention_mask[:-1])
    for row, one, coefficient, logits in zip(ids, vectors, numbers, together, strict=True):
        if one is None:
            (alone,) = passed(model, row)
        else:
            with steer(model, one, coefficient=coefficient, start=start):
                (alone,) = passed(model, row)
        close(logits[-len(row) :], alone)


@pytest.mark.parametrize("relative", [True, False])
def test_sums_and_contexts_inside_one_another_add_up(relative):
    model = loaded()
    v, w, plain = own_vectors(model, 1), own_vectors(model, 2), random_vectors(model)
    (row,) = ids_of(model, QUESTIONS[0])
    for one, other in ((v, w), (v, plain), (plain, v)):
        with (
            steer(model, one, coefficient=0.8, relative=relative),
            steer(model, other, coefficient=-0.2, relative=relative),
        ):
            (nested,) = passed(model, row)
        with steer(model, 2 * one - other / 2, coefficient=0.4, relative=relative):
            close(passed(model, row)[0], nested)
        with steer(model, [(one, 0.8), (other, -0.2)], relative=relative):
            close(passed(model, row)[0], nested)


def test_a_relative_coefficient_is_in_units_of_the_blocks_mean_norm():
    model = loaded()
    vectors = own_vectors(model)
    (row,) = ids_of(model, QUESTIONS[0])
    with steer(model, vectors, coefficient=0.5, relative=True):
        (found,) = passed(model, row)
    close(
        found,
        hooked("llama-gqa", row, 0.5 * vectors.resid_norm[:, None, None] * vectors.directions),
    )


def test_a_row_without_the_closing_tokens_is_named_unless_nothing_is_added_there():
    model = loaded()
    vectors, plain = own_vectors(model), random_vectors(model)
    (whole,) = ids_of(model, QUESTIONS[0])
    before = hook_count(model)
    for short in (whole[:-1], whole[:2]):
        with (
            pytest.raises(ValueError, match=rf"row 1 .* of {len(short)} tokens.*'assistant'"),
            steer(model, vectors, coefficient=1.0),
        ):
            passed(model, whole, short)
        for harmless, coefficient in ((plain, 1.0), (None, 1.0), (vectors, 0.0)):
            with steer(model, [vectors, harmless], coefficient=[1.0, coefficient]):
                passed(model, whole, short)
    with (
        pytest.raises(ValueError, match="inputs_embeds"),
        steer(model, vectors, coefficient=1.0),
    ):
        model.original_model(inputs_embeds=torch.zeros(1, 4, model.cfg.d_model))
    assert hook_count(model) == before


def test_vectors_of_other_closing_tokens_do_not_go_together():
    model = loaded()
    v = own_vectors(model)
    w = replace(own_vectors(model, 1), closing=(1, *v.closing[1:]))
    for mixed in ([(v, 1.0), (w, 1.0)], [v, w]):
        with (
            pytest.raises(ValueError, match="different closing tokens"),
            steer(model, mixed, coefficient=1.0),
        ):
            pass
