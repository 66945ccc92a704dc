from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache, partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import hook_count, plain_hooks, random_vectors, reference_tokens

from lenskit.generation import (
    Answer,
    SteeringRow,
    end_tokens,
    generate,
    generate_ids,
    generate_steered,
)
from lenskit.models import chat_ids
from lenskit.steering import steer

# What the plain hooks add is absolute.
steer = partial(steer, relative=False)
generate_steered = partial(generate_steered, relative=False)
ARCHITECTURES = [
    *("llama", "llama-gqa", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("mistral", "phi3", "olmo2", "opt"),
]
QUESTIONS = (
    "Why?",
    "What is the scariest thing in the world? Answer in 20 words or less.",
    "Rain?",
)
TOKENS = 8


@pytest.fixture
def model():
    return tiny.shared_model()


def user(text):
    return [{"role": "user", "content": text}]


def ids_of(model, question) -> list[int]:
    return chat_ids(model, [user(question)]).input_ids[0].tolist()


def hugging_face(model, questions, number=TOKENS, **options) -> list[list[int]]:
    """What Hugging Face's own ``generate`` writes in one padded batch, end tokens cut off."""
    tokens = chat_ids(model, [user(question) for question in questions])
    reference = tiny.reference_model(tiny.shared_folder())
    written = reference.generate(
        tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=number,
        do_sample=False,
        pad_token_id=5,
        **options,
    )[:, tokens.input_ids.shape[1] :]
    ends = options.get("eos_token_id", [4])
    cut = []
    for row in written.tolist():
        stops = [i for i, token in enumerate(row) if token in ends]
        cut.append(row[: stops[0]] if stops else row)
    return cut


def test_unsteered_answers_equal_hugging_faces_generate(model):
    expected = hugging_face(model, QUESTIONS)
    assert [list(answer.token_ids) for answer in generate(model, QUESTIONS, max_new_tokens=8)] == (
        expected
    )
    rows = [SteeringRow(question, None, 0.0) for question in QUESTIONS]
    assert [list(a.token_ids) for a in generate_steered(model, rows, max_new_tokens=8)] == expected
    vectors = random_vectors(model)
    zero = [SteeringRow(question, vectors, 0.0) for question in QUESTIONS]
    assert [list(a.token_ids) for a in generate_steered(model, zero, max_new_tokens=8)] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("start", [0, 25])
def test_each_row_equals_plain_hooks_without_cache_or_padding(architecture, start):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    first, second = random_vectors(model, 1), random_vectors(model, 2)
    scale = 40.0 if architecture in ("gemma2", "gemma3") else 4.0
    rows = [
        SteeringRow(QUESTIONS[0], first, scale),
        SteeringRow(QUESTIONS[1], first, -scale),
        SteeringRow(QUESTIONS[1], None, 0.0),
        SteeringRow(QUESTIONS[2], second, 2 * scale, prefix="Take on a cheerful mood."),
    ]
    answers = generate_steered(model, rows, max_new_tokens=TOKENS, blocks=[0, 2], start=start)
    for row, answer in zip(rows, answers, strict=True):
        delta = torch.zeros(3, model.cfg.d_model)
        if row.vectors is not None:
            delta[[0, 2]] = row.coefficient * row.vectors.directions[[0, 2]]
        ids = ids_of(model, f"{row.prefix} {row.question}".strip())
        expected = reference_tokens(reference, ids, delta, TOKENS, start=start)
        assert list(answer.token_ids) == expected
    assert answers[1].token_ids != answers[2].token_ids


@pytest.mark.parametrize("operation", ["add", "rotate"])
def test_each_row_may_be_steered_at_other_positions_of_its_own(model, operation):
    vectors = random_vectors(model)
    positions = ("all", "prompt", "generated", "answer", "prompt")
    asked = (*QUESTIONS, QUESTIONS[1], QUESTIONS[0])
    rows = [
        SteeringRow(question, vectors, 4.0, operation=operation, positions=where)
        for question, where in zip(asked, positions, strict=True)
    ]
    answers = generate_steered(model, rows, max_new_tokens=TOKENS, batch_size=3)
    alone = [generate_steered(model, [row], max_new_tokens=TOKENS)[0] for row in rows]
    assert answers == alone
    if operation != "add":
        return
    reference = tiny.reference_model(tiny.shared_folder())
    for row, answer in zip(rows, answers, strict=True):
        ids = ids_of(model, row.question)
        start = {"generated": len(ids), "answer": len(ids) - 1}.get(row.positions, 0)
        stop = len(ids) if row.positions == "prompt" else None
        delta = 4.0 * vectors.directions
        expected = reference_tokens(reference, ids, delta, TOKENS, start=start, stop=stop)
        assert list(answer.token_ids) == expected
    with pytest.raises(ValueError, match="positions must be one of all, prompt"):
        SteeringRow("Why?", vectors, 1.0, positions="first")


def test_generate_inside_steer_equals_generate_steered_and_both_other_generates(model):
    vectors = random_vectors(model)
    rows = [SteeringRow(question, vectors, 3.0) for question in QUESTIONS]
    expected = generate_steered(model, rows, max_new_tokens=TOKENS, blocks=[1, 2], start=20)
    tokens = chat_ids(model, [user(question) for question in QUESTIONS])
    options = dict(max_new_tokens=TOKENS, do_sample=False)
    masked = dict(options, attention_mask=tokens.attention_mask)
    for coefficient in (3.0, [3.0, 3.0, 3.0]):
        with steer(model, vectors, coefficient=coefficient, blocks=[1, 2], start=20):
            assert generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected
            bridge = model.generate(tokens.input_ids, verbose=False, **masked)
            theirs = model.original_model.generate(tokens.input_ids, pad_token_id=5, **masked)
        width = tokens.input_ids.shape[1]
        for answer, a, b in zip(expected, bridge.tolist(), theirs.tolist(), strict=True):
            assert tuple(a[width:]) == tuple(b[width:]) == answer.token_ids


def test_rows_of_steer_stay_with_their_questions_when_batches_are_sorted(model):
    vectors, coefficients = random_vectors(model), [4.0, -4.0, 0.0]
    expected = []
    for question, coefficient in zip(QUESTIONS, coefficients, strict=True):
        with steer(model, vectors, coefficient=coefficient):
            expected.append(generate(model, question, max_new_tokens=TOKENS))
    for batch_size in (1, 2, 3):
        with steer(model, vectors, coefficient=coefficients):
            assert generate(model, QUESTIONS, max_new_tokens=8, batch_size=batch_size) == expected
            # The intervention has its own order of rows again.
            tokens = chat_ids(model, [user(question) for question in QUESTIONS])
            with torch.no_grad():
                model(tokens.input_ids, attention_mask=tokens.attention_mask)


def test_contexts_inside_one_another_add_up_in_generation(model):
    first, second = random_vectors(model, 1), random_vectors(model, 2)
    with steer(model, [(first, 3.0), (second, [1.0, -4.0, 0.0])]):
        expected = generate(model, QUESTIONS, max_new_tokens=TOKENS)
    rows = [SteeringRow(q, second, c) for q, c in zip(QUESTIONS, [1.0, -4.0, 0.0], strict=True)]
    with steer(model, first, coefficient=3.0):
        assert generate_steered(model, rows, max_new_tokens=TOKENS) == expected


@cache
def alone(question: str, seed: int | None, coefficient: float, ends: tuple[int, ...]) -> Answer:
    model = tiny.shared_model()
    row = SteeringRow(question, None if seed is None else random_vectors(model, seed), coefficient)
    return generate_steered(model, [row], max_new_tokens=6, relative=True)[0]


ROW = st.tuples(
    st.sampled_from(QUESTIONS), st.sampled_from([None, 1, 2]), st.sampled_from([-2.0, 0.5, 2.0])
)


@settings(max_examples=12, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=8), batch_size=st.integers(1, 8))
def test_a_row_does_not_depend_on_its_batch(rows, batch_size):
    model = tiny.shared_model()
    configured = model.original_model.generation_config
    before = configured.eos_token_id
    # Frequent end tokens, so that rows leave the batch at different times.
    ends = configured.eos_token_id = [4, *range(100, 200)]
    try:
        planned = [
            SteeringRow(q, None if seed is None else random_vectors(model, seed), coefficient)
            for q, seed, coefficient in rows
        ]
        answers = generate_steered(
            model, planned, max_new_tokens=6, batch_size=batch_size, relative=True
        )
        for (question, seed, coefficient), answer in zip(rows, answers, strict=True):
            expected = alone(question, seed, coefficient, tuple(ends))
            assert answer.token_ids == expected.token_ids
            assert answer.finished == expected.finished
    finally:
        configured.eos_token_id = before


@pytest.fixture
def frequent_ends(model, monkeypatch):
    """End tokens that rows really write, at different steps."""
    plain = generate(model, QUESTIONS, max_new_tokens=12)
    ends = [4, plain[0].token_ids[2], plain[1].token_ids[6]]
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", ends)
    return ends


def test_answers_stop_at_any_end_token_and_say_so(model, frequent_ends):
    answers = generate(model, QUESTIONS, max_new_tokens=12)
    expected = hugging_face(model, QUESTIONS, 12, eos_token_id=frequent_ends)
    assert [list(answer.token_ids) for answer in answers] == expected
    for answer in answers:
        assert answer.finished == (len(answer.token_ids) < 12)
        assert not set(answer.token_ids) & set(frequent_ends)
    assert answers[0].finished and answers[1].finished
    short = generate(model, QUESTIONS, max_new_tokens=2)
    assert not any(answer.finished for answer in short)
    assert [a.token_ids for a in short] == [a.token_ids[:2] for a in answers]


def test_rows_that_ended_leave_the_batch_with_their_vectors(model, monkeypatch):
    vectors = random_vectors(model)
    rows = [SteeringRow(q, vectors, c) for q in QUESTIONS for c in (-3.0, 0.0, 3.0)]
    endless = generate_steered(model, rows, max_new_tokens=12)
    ends = [answer.token_ids[step] for step, answer in enumerate(endless[:6], start=2)]
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", ends)
    expected = [generate_steered(model, [row], max_new_tokens=12)[0] for row in rows]
    sizes = []

    def size(value, hook):
        sizes.append(len(value))

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", size)]):
        answers = generate_steered(model, rows, max_new_tokens=12)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert sizes[0] == 9
    assert sizes[-1] <= 6
    assert sizes == sorted(sizes, reverse=True)


def test_generation_ends_with_the_last_row(model, monkeypatch):
    configured = model.original_model.generation_config
    monkeypatch.setattr(configured, "eos_token_id", list(range(420)))
    steps = []
    with model.hooks(fwd_hooks=[("ln_final.hook_out", lambda value, hook: steps.append(1))]):
        answers = generate(model, QUESTIONS)
    assert len(steps) == 1
    assert answers == ["", "", ""]
    assert all(answer.finished and answer.token_ids == () for answer in answers)


def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(model, monkeypatch):
    configured = model.original_model.generation_config
    for given_ids, expected in (([7, 9], (4, 7, 9)), (7, (4, 7)), (None, (4,))):
        monkeypatch.setattr(configured, "eos_token_id", given_ids)
        assert end_tokens(model) == expected


def test_one_text_gives_one_answer_and_a_list_gives_a_list(model):
    answer = generate(model, QUESTIONS[0], max_new_tokens=4)
    assert isinstance(answer, str)
    assert generate(model, [QUESTIONS[0]], max_new_tokens=4) == [answer]
    assert generate(model, [user(QUESTIONS[0])], max_new_tokens=4) == [answer]
    mixed = generate(model, [user(QUESTIONS[1]), QUESTIONS[0]], max_new_tokens=4)
    assert mixed[1] == answer
    assert generate(model, []) == []
    assert generate_steered(model, []) == []


def test_a_conversation_keeps_its_system_message_and_earlier_turns(model):
    conversation = [
        {"role": "system", "content": "Be brief."},
        *user("Why?"),
        {"role": "assistant", "content": "Rain."},
        *user("Why?"),
    ]
    answer = generate(model, [conversation], max_new_tokens=4)[0]
    reference = tiny.reference_model(tiny.shared_folder())
    ids = chat_ids(model, [conversation]).input_ids[0].tolist()
    assert list(answer.token_ids) == reference_tokens(reference, ids, torch.zeros(3, 32), 4)


def test_no_new_tokens_give_empty_answers(model):
    assert generate(model, "Why?", max_new_tokens=0) == ""
    answers = generate(model, QUESTIONS, max_new_tokens=0)
    assert answers == ["", "", ""]
    assert not any(answer.finished for answer in answers)


def test_the_text_leaves_special_tokens_out(model):
    special = set(model.tokenizer.all_special_ids)
    bias = torch.zeros(420)
    bias[list(special - {4})] = 50.0

    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: value + bias)]):
        answer = generate(model, "Why?", max_new_tokens=5)
    assert len(answer.token_ids) == 5 and set(answer.token_ids) <= special
    assert answer == ""


def test_a_prefix_goes_before_the_question_with_one_space(model):
    with_prefix = SteeringRow("Why?", None, 0.0, prefix="Take on a cheerful mood.")
    expected = generate(model, "Take on a cheerful mood. Why?", max_new_tokens=6)
    assert generate_steered(model, [with_prefix], max_new_tokens=6) == [expected]


def test_relative_coefficients_are_scaled_by_each_rows_own_norms(model):
    vectors = random_vectors(model)
    scaled = replace(vectors, directions=vectors.directions * vectors.resid_norm[:, None])
    rows = [SteeringRow(question, vectors, 0.7) for question in QUESTIONS]
    expected = [SteeringRow(question, scaled, 0.7) for question in QUESTIONS]
    assert generate_steered(model, rows, relative=True, max_new_tokens=6) == generate_steered(
        model, expected, max_new_tokens=6
    )


@settings(max_examples=6, deadline=None)
@given(batch_size=st.integers(1, 6), seed=st.integers(0, 3))
def test_a_sample_depends_on_its_seed_and_place_but_not_on_its_batch(batch_size, seed):
    model = tiny.shared_model()
    questions = [*QUESTIONS, *QUESTIONS]
    options = dict(max_new_tokens=5, temperature=1.5, seed=seed)
    together = generate(model, questions, **options)
    apart = generate(model, questions, batch_size=batch_size, **options)
    assert [a.token_ids for a in apart] == [a.token_ids for a in together]
    assert generate(model, questions[0], **options) == together[0]
    assert together[0].token_ids != together[3].token_ids
    other = generate(model, questions, max_new_tokens=5, temperature=1.5, seed=seed + 1)
    assert [a.token_ids for a in other] != [a.token_ids for a in together]


def test_samples_follow_the_softmax_of_the_logits(model):
    ids = ids_of(model, "Why?")
    with torch.no_grad():
        logits = tiny.reference_model(tiny.shared_folder())(torch.tensor([ids])).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    drawn = generate(model, ["Why?"] * 1500, max_new_tokens=1, temperature=2.0, batch_size=500)
    # The end token is drawn too, but it is not part of an answer.
    tokens = torch.tensor([answer.token_ids[0] if answer.token_ids else 4 for answer in drawn])
    frequencies = torch.bincount(tokens, minlength=420) / len(drawn)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((frequencies - expected).abs() <= 5 * error + 1e-3).all()
    cold = generate(model, ["Why?"] * 5, max_new_tokens=4, temperature=1e-4)
    assert set(cold) == {str(generate(model, "Why?", max_new_tokens=4))}


def test_logits_that_are_not_numbers_are_an_error_and_leave_no_hook(model):
    before = hook_count(model)
    rows = [SteeringRow("Why?", random_vectors(model), 1e42), SteeringRow("Rain?", None, 0.0)]
    with pytest.raises(ValueError, match="not numbers"):
        generate_steered(model, rows)
    assert hook_count(model) == before
    assert (
        generate(model, "Why?", max_new_tokens=3)
        == generate_steered(model, [SteeringRow("Why?", None, 0.0)], max_new_tokens=3)[0]
    )


def test_a_batch_that_does_not_fit_into_memory_is_halved(model, monkeypatch):
    vectors = random_vectors(model)
    rows = [SteeringRow(q, vectors, c) for q in QUESTIONS for c in (-3.0, 3.0)]
    expected = generate_steered(model, rows, max_new_tokens=4)
    limit = 2

    def small_memory(value, hook):
        if len(value) > limit:
            raise torch.OutOfMemoryError("too many rows")

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", small_memory)]):
        assert generate_steered(model, rows, max_new_tokens=4) == expected
        limit = 0
        with pytest.raises(torch.OutOfMemoryError):
            generate_steered(model, rows, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, QUESTIONS, **options)


def test_rows_that_do_not_match_the_questions_are_refused(model):
    with (
        steer(model, random_vectors(model), coefficient=[1.0, 2.0]),
        pytest.raises(ValueError, match="2 rows, but there are 3 questions"),
    ):
        generate(model, QUESTIONS)
    with pytest.raises(TypeError, match="put each conversation in a list"):
        generate(model, user("Why?"))


def test_beams_are_refused_where_rows_differ_and_equal_hugging_face_where_not(model):
    vectors = random_vectors(model)
    tokens = chat_ids(model, [user(question) for question in QUESTIONS])
    options = dict(
        attention_mask=tokens.attention_mask,
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        pad_token_id=5,
    )
    with (
        steer(model, vectors, coefficient=[1.0, 2.0, 3.0]),
        pytest.raises(ValueError, match="beam"),
    ):
        model.original_model.generate(tokens.input_ids, **options)
    with steer(model, vectors, coefficient=3.0):
        ours = model.original_model.generate(tokens.input_ids, **options)
    reference = tiny.reference_model(tiny.shared_folder())
    with plain_hooks(reference, {i: 3.0 * v for i, v in enumerate(vectors.directions)}):
        assert torch.equal(ours, reference.generate(tokens.input_ids, **options))


def test_an_answer_is_a_text_that_can_be_copied_and_written_to_files():
    answer = Answer("spiders", finished=True, token_ids=[7, 8])
    twin = copy.deepcopy(answer)
    assert (twin, twin.finished, twin.token_ids) == ("spiders", True, (7, 8))
    assert json.dumps(answer) == '"spiders"'


def test_options_that_cannot_be_are_refused_for_no_questions_too():
    model = tiny.shared_model()
    for nothing in (generate, generate_ids):
        assert list(nothing(model, [])) == []
        with pytest.raises(ValueError, match="temperature"):
            nothing(model, [], temperature=-1.0)
        with pytest.raises(ValueError, match="batch_size"):
            nothing(model, [], batch_size=0)
