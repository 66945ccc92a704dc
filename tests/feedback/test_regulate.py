"""Closed loops at work, against the whole text anew for each token, without padding or cache."""

from __future__ import annotations

from functools import partial
from math import inf

import pytest
import tiny
import torch
from steered import own_vectors, plain_hooks, random_vectors

import lenskit as lk
from lenskit.feedback import LoopRecord
from lenskit.models import chat_ids, unwatched

pytestmark = pytest.mark.usefixtures("nothing_left_on")

INSTRUCTION = "Answer in one word."
QUESTIONS = [
    f"{INSTRUCTION} Why?",
    f"What is the scariest thing in the world? {INSTRUCTION}",
    f"Rain? {INSTRUCTION}",
]
TOKENS, BLOCK, EPSILON = 7, 1, 3.0
# Readings of these models lie on both sides of these bounds.
LAWS = [
    {"low": -0.5, "high": 0.5},
    {"low": 0.0, "hold": 2},
    {"low": -3.0, "high": 3.0, "proportional": True},
    {"low": -0.5, "high": 0.5, "when": "above", "hold": 1},
]
steer = partial(lk.steer, relative=False)


def ids_of(model, question):
    return chat_ids(model, [[{"role": "user", "content": question}]]).input_ids


def batch_of(model, questions=QUESTIONS):
    return chat_ids(model, [[{"role": "user", "content": one}] for one in questions])


def watched(vectors, **law):
    return lk.ClosedLoop(lk.Projection(vectors, BLOCK, relative=False), **law)


class Law:
    """The law of a loop once more, for one row."""

    def __init__(self, low, high=None, when="below", proportional=False, hold=0):
        self.low, self.high = low, low if high is None else high
        self.sign = 1 if when == "below" else -1
        self.proportional, self.hold, self.asked = proportional, hold, []

    def __call__(self, reading):
        low, high = sorted((self.sign * self.low, self.sign * self.high))
        reading = self.sign * reading
        if self.proportional:
            asked = min(1.0, max(0.0, (high - reading) / (high - low)))
        else:
            on = bool(self.asked and self.asked[-1])
            asked = float(reading < low or (on and reading < high))
        self.asked.append(asked)
        return max(self.asked[-1 - self.hold :])


@torch.no_grad()
def reference_loop(reference, ids, vector, law, coefficient):
    """Greedy tokens, readings and gains of one prompt under a loop on ``BLOCK`` and all blocks."""
    length, gains, readings, chosen = ids.shape[1], [], [], []
    seen = {}

    def look(module, inputs, output):
        seen["h"] = output[0] if isinstance(output, tuple) else output

    def run(ids, gains):
        column = torch.tensor(gains)[:, None]
        additions = {layer: coefficient * column * row for layer, row in enumerate(vector)}
        with plain_hooks(reference, additions):
            layers = [m for m in reference.modules() if isinstance(m, torch.nn.ModuleList)]
            depth = reference.config.num_hidden_layers
            block = next(each for each in layers if len(each) == depth)[BLOCK]
            handle = block.register_forward_hook(look)
            logits = reference(ids, use_cache=False).logits
            handle.remove()
        return float(seen["h"][0, -1] @ vector[BLOCK]), int(logits[0, -1].argmax())

    reading, _ = run(ids, [0.0] * length)
    for _ in range(TOKENS):
        readings.append(reading)
        gain = law(reading)
        gains += [gain] * (ids.shape[1] - len(gains))
        reading, token = run(ids, gains)
        chosen.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return chosen, readings, gains[length - 1 :]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "mistral-window"])
def test_a_padded_cached_batch_is_what_each_text_is_anew_for_every_token(architecture, law):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    vectors = random_vectors(model)
    coefficient = -EPSILON if "when" in law else EPSILON
    edit = steer(model, vectors, coefficient=coefficient)
    with lk.regulate(model, watched(vectors, **law), edit) as record:
        answers = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    changed = 0
    for row, question in enumerate(QUESTIONS):
        ids = ids_of(model, question)
        found = reference_loop(reference, ids, vectors.directions, Law(**law), coefficient)
        tokens, readings, gains = found
        own = list(answers[row].token_ids)
        assert own == tokens[: len(own)]
        number = len(own)  # behind its end a row may stay in the batch
        assert record.readings[row][:number] == pytest.approx(readings[:number], abs=2e-3)
        assert record.gains[row][:number] == pytest.approx(gains[:number], abs=2e-3)
        changed += len({*gains}) > 1
    assert changed, "a law that never changes its mind shows little"


def test_a_loop_whose_band_is_never_left_is_bit_identical_to_the_unsteered_model(model):
    vectors, tokens = random_vectors(model), batch_of(model)
    span = [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]
    plain = model(tokens.input_ids, attention_mask=tokens.attention_mask)
    expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    for loop in (
        watched(vectors, low=-inf),
        lk.ClosedLoop(lk.AttentionMass(span), high=1.5, when="above"),
    ):
        edits = [
            steer(model, vectors, coefficient=EPSILON),
            lk.attend(model, span, lk.InstABoost(5.0)),
        ]
        with lk.regulate(model, loop, *edits) as record:
            logits = model(tokens.input_ids, attention_mask=tokens.attention_mask)
            assert torch.equal(logits, plain)
            assert lk.generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected
        assert {gain for row in record.gains for gain in row} == {0.0}


@pytest.mark.parametrize("operation", ["add", "clamp", "project_out", "rotate"])
def test_a_loop_whose_band_is_always_left_equals_plain_steering(model, operation):
    vectors, tokens = random_vectors(model), batch_of(model)
    edit = partial(steer, model, vectors, coefficient=EPSILON, operation=operation, start=2)
    with edit():
        plain = model(tokens.input_ids, attention_mask=tokens.attention_mask)
        expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    with lk.regulate(model, watched(vectors, low=inf), edit()):
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask)
        assert torch.equal(logits, plain)
        assert lk.generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected


def test_vectors_of_closing_tokens_are_regulated_at_these(model):
    own, tokens = own_vectors(model), batch_of(model)
    with steer(model, own, coefficient=EPSILON):
        expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    loop = watched(random_vectors(model), low=inf)
    with lk.regulate(model, loop, steer(model, own, coefficient=EPSILON)):
        assert lk.generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected
    half = lk.ClosedLoop(lambda model: Constant(0.5), 0.0, 1.0, proportional=True)
    with steer(model, own, coefficient=EPSILON / 2):
        plain = model(tokens.input_ids, attention_mask=tokens.attention_mask)
    with lk.regulate(model, half, steer(model, own, coefficient=EPSILON)):
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask)
    torch.testing.assert_close(logits, plain)


class Constant:
    """A reader of one's own: always the same."""

    what, number = "nothing is read", None

    def __init__(self, value):
        self.reading = torch.tensor([value])

    def batch(self, rows):
        pass

    def keep(self, rows):
        pass

    def before_forward(self, module, args, kwargs):
        pass

    def hooks(self):
        return []


@pytest.mark.parametrize("bound", [-inf, inf])
def test_policies_are_on_or_off_as_a_whole(model, bound):
    spans = [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]
    heads = lk.Heads({0: [1], 2: [0, 3]})
    for policy in (lk.Pasta(0.01), lk.Spotlight(0.9), lk.Knockout()):
        edit = partial(lk.attend, model, spans, policy, heads=heads, protect_bos=True)
        with edit() if bound > 0 else steer(model, random_vectors(model), coefficient=0.0):
            expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
        with lk.regulate(model, lk.ClosedLoop(lk.AttentionMass(spans, heads), low=bound), edit()):
            assert lk.generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected


@torch.no_grad()
def reference_mass_loop(model, question, heads, policy, law):
    """One prompt, the whole text anew for every token, the mass read from plain pattern hooks."""
    span = lk.span(model, question, INSTRUCTION)
    ids, gains, readings, chosen, masses = ids_of(model, question), [0.0], [], [], []

    def look(value, hook):
        block = int(hook.name.split(".")[1])
        mass = value[0, :, -1, list(span.positions)].sum(-1)
        masses.extend(float(mass[head]) for head in heads.by_block()[block])

    hooks = [(f"blocks.{block}.attn.hook_pattern", look) for block in heads.by_block()]

    def run(ids):
        masses.clear()
        schedule = torch.tensor(gains)
        with lk.attend(model, span, policy, heads=heads, schedule=lambda step: schedule[step]):
            with model.hooks(fwd_hooks=hooks):
                logits = model(ids, use_cache=False)
        return sum(masses) / len(masses), int(logits[0, -1].argmax())

    reading, _ = run(ids)
    for step in range(TOKENS):
        readings.append(reading)
        gains[step:] = [law(reading)]
        reading, token = run(ids)
        chosen.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return chosen, readings, gains


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "mistral-window"])
def test_a_loop_on_attention_mass_is_what_plain_hooks_and_schedules_give(architecture):
    model = tiny.shared_model(architecture)
    heads, policy = lk.Heads({0: [1], 1: [2, 3]}), lk.InstABoost(20.0)
    spans = [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]
    law = {"low": 0.25, "high": 0.35, "hold": 1}
    loop = lk.ClosedLoop(lk.AttentionMass(spans, heads), **law)
    with lk.regulate(model, loop, lk.attend(model, spans, policy, heads=heads)) as record:
        answers = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    found = set()
    for row, question in enumerate(QUESTIONS):
        tokens, readings, gains = reference_mass_loop(model, question, heads, policy, Law(**law))
        own = list(answers[row].token_ids)
        assert own == tokens[: len(own)]
        assert record.readings[row][: len(own)] == pytest.approx(readings[: len(own)], abs=1e-4)
        assert record.gains[row][: len(own)] == gains[: len(own)]
        found |= {*gains}
    assert found == {0.0, 1.0}


@pytest.mark.parametrize("law", LAWS)
def test_generation_without_a_cache_equals_that_with_one(model, law):
    vectors, tokens, results = random_vectors(model), batch_of(model), []
    spans = [lk.span(model, question, INSTRUCTION) for question in QUESTIONS]
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 5}
    for cached in (True, False):
        edits = [
            steer(model, vectors, coefficient=EPSILON),
            lk.attend(model, spans, lk.LogitBias(2.0)),
        ]
        with lk.regulate(model, watched(vectors, **law), *edits) as record:
            written = model.original_model.generate(
                tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=cached, **options
            )
        results.append((written, torch.tensor(record.gains), torch.tensor(record.readings)))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_rows_are_independent_whatever_their_batch_and_their_padding(model):
    vectors = [random_vectors(model), None, random_vectors(model, 1)]
    loop = lk.ClosedLoop(lk.Projection(vectors, BLOCK, relative=False), low=0.3, hold=1)
    coefficients = [EPSILON, EPSILON, -EPSILON]
    for size in (1, 2, 3):
        edit = steer(model, vectors, coefficient=coefficients)
        with lk.regulate(model, loop, edit) as record:
            answers = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS, batch_size=size)
        for row, question in enumerate(QUESTIONS):
            if vectors[row] is None:
                assert {*record.gains[row]} == {0.0}
                assert answers[row] == lk.generate(model, question, max_new_tokens=TOKENS)
                continue
            own = lk.ClosedLoop(lk.Projection(vectors[row], BLOCK, False), low=0.3, hold=1)
            alone = steer(model, vectors[row], coefficient=coefficients[row])
            with lk.regulate(model, own, alone) as single:
                assert lk.generate(model, question, max_new_tokens=TOKENS) == answers[row]
            number = len(answers[row].token_ids)
            assert record.gains[row][:number] == single.gains[0][:number]


def test_a_reading_is_in_the_unit_of_the_coefficients(model):
    vectors, tokens = random_vectors(model), batch_of(model)
    loop = lk.ClosedLoop(lk.Projection(vectors, BLOCK), low=-inf)
    clamped = lk.steer(model, vectors, coefficient=0.7, operation="clamp", blocks=[BLOCK])
    other = steer(model, vectors, coefficient=1.0, blocks=[2])
    with clamped, lk.regulate(model, loop, other) as record:
        model(tokens.input_ids, attention_mask=tokens.attention_mask)
    assert [row[0] for row in record.readings] == pytest.approx([0.7] * 3, abs=1e-5)


def test_the_reading_of_the_prompt_is_seen_by_nobody_else(model):
    vectors, tokens = random_vectors(model), batch_of(model)
    concept = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, concept, number=4)
    edit = partial(steer, model, vectors, coefficient=EPSILON)
    with edit():
        expected = lk.capture(model, prompts, progress=False)
    calls = []
    with lk.regulate(model, watched(vectors, low=inf), edit()):
        found = lk.capture(model, prompts, progress=False)
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda v, hook: calls.append(v))]):
            model(tokens.input_ids, attention_mask=tokens.attention_mask)
    assert torch.equal(found.resid_post, expected.resid_post) and len(calls) == 1


def test_hooks_hidden_for_a_while_come_back_in_their_order(model):
    calls = []
    names = "blocks.0.hook_resid_post"
    hooks = [(names, lambda v, hook, i=i: calls.append(i)) for i in range(3)]
    tokens = batch_of(model)
    with model.hooks(fwd_hooks=hooks):
        with pytest.raises(RuntimeError), unwatched(model):
            model(tokens.input_ids, attention_mask=tokens.attention_mask)
            raise RuntimeError
        assert not calls
        model(tokens.input_ids, attention_mask=tokens.attention_mask)
    assert calls == [0, 1, 2]


def test_loops_inside_one_another_each_govern_their_own(model):
    vectors, others = random_vectors(model), random_vectors(model, 1)
    with steer(model, vectors, coefficient=EPSILON):
        expected = lk.generate(model, QUESTIONS, max_new_tokens=TOKENS)
    outer = lk.regulate(
        model, watched(vectors, low=inf), steer(model, vectors, coefficient=EPSILON)
    )
    inner = partial(steer, model, others, coefficient=9.0)
    with outer, lk.regulate(model, watched(others, low=-inf), inner()):
        assert lk.generate(model, QUESTIONS, max_new_tokens=TOKENS) == expected


def test_a_pass_that_the_loop_has_not_seen_begin_is_refused(model):
    vectors, tokens = random_vectors(model), batch_of(model, QUESTIONS[:1])
    hf_model = model.original_model
    with torch.no_grad():
        cache = hf_model(tokens.input_ids, use_cache=True).past_key_values
    edit = partial(steer, model, vectors, coefficient=EPSILON)
    with lk.regulate(model, watched(vectors, low=0.0), edit()), torch.no_grad():
        with pytest.raises(ValueError, match="the loop has seen nothing"):
            hf_model(tokens.input_ids[:, :1], past_key_values=cache)
        lk.generate(model, "Why?", max_new_tokens=2)
    with lk.regulate(model, watched(vectors, low=0.0), edit()):
        with pytest.raises(ValueError, match="the loop has seen"):
            other = steer(model, vectors, coefficient=1.0)
            lk.generate_plausible(model, "Why?", other, max_new_tokens=3)


def test_what_cannot_be_regulated_is_refused(model):
    vectors = random_vectors(model)
    edit = partial(steer, model, vectors, coefficient=EPSILON)
    for words, loop, edits in (
        ("there are none", watched(vectors, low=0.0), []),
        (
            "there are none",
            watched(vectors, low=0.0),
            [
                lk.steer(
                    tiny.shared_model("gpt2"),
                    random_vectors(tiny.shared_model("gpt2")),
                    coefficient=1.0,
                )
            ],
        ),
        ("block must be", lk.ClosedLoop(lk.Projection(vectors, 3), low=0.0), [edit()]),
        (
            "each closing token",
            lk.ClosedLoop(lk.Projection(own_vectors(model), 1), low=0.0),
            [edit()],
        ),
        (
            "zero at block 1",
            lk.ClosedLoop(lk.Projection({0: torch.ones(32), 1: torch.zeros(32)}, 1), low=0.0),
            [edit()],
        ),
        ("span holds no span", lk.ClosedLoop(lk.AttentionMass([None]), low=0.0), [edit()]),
    ):
        with pytest.raises(ValueError, match=words):
            with lk.regulate(model, loop, *edits):
                pass
    with pytest.raises(TypeError, match="has no gain"):
        inner = lk.regulate(model, watched(vectors, low=0.0), edit())
        with lk.regulate(model, watched(vectors, low=0.0), inner):
            pass


def test_a_record_prints_as_a_short_table():
    record = LoopRecord()
    record.begin([1, 0])
    record.add([1, 0], [0.5, 0.1], [0.0, 1.0])
    record.add([0], [0.2], [0.5])
    assert record.gains == [[1.0, 0.5], [0.0]] and record.readings == [[0.1, 0.2], [0.5]]
    assert "row 0  steered in 2 of 2 passes, mean gain 0.75" in repr(record)
