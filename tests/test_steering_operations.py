"""Steering by other operations than addition: exact for every row, position, chunk and nesting."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import decoder_layers, hook_count, own_vectors, random_vectors

from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.models import chat_ids, load_model, pad_left
from lenskit.operations import OPERATIONS
from lenskit.steering import steer

steer = partial(steer, relative=False)
PROMPTS = ([0, 40, 50, 60, 70, 80, 90], [0, 33, 44], [0, 111, 122, 133, 144])
OTHERS = [name for name in OPERATIONS if name != "add"]


@pytest.fixture
def model():
    return tiny.shared_model()


@torch.no_grad()
def run(model, tokens, **options):
    return model(tokens.input_ids, attention_mask=tokens.attention_mask, **options)


@contextmanager
def plainly(hf_model, functions):
    """Plain PyTorch hooks that replace the output of decoder layers by a function of it."""

    def hook(function):
        def change(module, inputs, output):
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        return change

    layers = decoder_layers(hf_model)
    handles = [layers[i].register_forward_hook(hook(one)) for i, one in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt_neox", "gemma2"])
def test_an_operation_is_what_a_plain_hook_on_hugging_face_does(architecture, name):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    vectors, operation = random_vectors(model), OPERATIONS[name]
    functions = {
        block: lambda h, v=v: operation(h.double(), 2.5 * v.double()[None, None]).float()
        for block, v in enumerate(vectors.directions)
    }
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = reference(ids).logits
        with plainly(reference, functions):
            expected = reference(ids).logits
        with steer(model, vectors, coefficient=2.5, operation=name):
            steered = model(ids)
    torch.testing.assert_close(steered, expected, atol=2e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.05


def stream(model, tokens, block):
    seen = []
    hooks = [(f"blocks.{block}.hook_resid_post", lambda value, hook: seen.append(value))]
    with model.hooks(fwd_hooks=hooks):
        run(model, tokens)
    return seen[0]


def test_after_projecting_out_nothing_is_left_and_a_clamp_sets_what_is_there(model):
    vectors, tokens = random_vectors(model), pad_left(PROMPTS, 5)
    u = vectors.directions[1]
    with steer(model, vectors, operation="project_out"):
        assert (stream(model, tokens, 1) @ u).abs().max() < 1e-5
    with steer(model, vectors, coefficient=-1.5, operation="clamp"):
        projected = stream(model, tokens, 1) @ u
    torch.testing.assert_close(projected, torch.full_like(projected, -1.5), atol=1e-5, rtol=0)
    with steer(model, vectors, coefficient=0.5, relative=True, operation="clamp"):
        projected = stream(model, tokens, 1) @ u
    expected = torch.full_like(projected, 0.5 * float(vectors.resid_norm[1]))
    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(st.sampled_from([*OPERATIONS]), min_size=3, max_size=3),
    start=st.integers(0, 4),
)
def test_rows_with_their_own_operations_equal_the_same_rows_alone(names, start):
    model = tiny.shared_model()
    vectors, numbers = random_vectors(model), [2.0, -1.0, 0.5]
    with steer(model, vectors, coefficient=numbers, operation=names, start=start):
        together = run(model, pad_left(PROMPTS, 5))
    for row, prompt in enumerate(PROMPTS):
        with steer(model, vectors, coefficient=numbers[row], operation=names[row], start=start):
            alone = run(model, pad_left([prompt], 5))
        own = together[row, -len(prompt) :]
        torch.testing.assert_close(own, alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("start", [0, 3])
def test_chunks_with_a_cache_equal_the_whole_text_at_once(model, name, start):
    vectors, tokens = random_vectors(model), pad_left(PROMPTS, 5)
    hf_model = model.original_model
    with steer(model, vectors, coefficient=1.5, operation=name, start=start), torch.no_grad():
        whole = run(model, tokens)
        positions = (tokens.attention_mask.cumsum(1) - 1).clamp(min=0)
        cache, pieces = None, []
        for left, right in ((0, 4), (4, 6), (6, 7)):
            output = hf_model(
                input_ids=tokens.input_ids[:, left:right],
                attention_mask=tokens.attention_mask[:, :right],
                position_ids=positions[:, left:right],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            pieces.append(output.logits)
    real = tokens.attention_mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_positions_before_the_start_are_bit_identical(model, name):
    vectors, tokens = random_vectors(model), pad_left(PROMPTS[:1], 5)
    plain = stream(model, tokens, 0)
    with steer(model, vectors, coefficient=1.5, operation=name, start=3, blocks=[0]):
        steered = stream(model, tokens, 0)
    assert torch.equal(steered[:, :3], plain[:, :3])
    assert not torch.allclose(steered[:, 3:], plain[:, 3:], atol=1e-3)


def test_contexts_inside_one_another_act_in_order_the_outermost_first(model):
    vectors, others = random_vectors(model), random_vectors(model, seed=1)
    tokens = pad_left(PROMPTS, 5)
    plain = stream(model, tokens, 0)
    v, u = 2.0 * others.directions[0], vectors.directions[0]

    def without(h):
        return h - (h @ u)[..., None] * u

    removing = partial(steer, model, vectors, operation="project_out", blocks=[0])
    adding = partial(steer, model, others, coefficient=2.0, blocks=[0])
    with removing(), adding():
        torch.testing.assert_close(stream(model, tokens, 0), without(plain) + v)
    with adding(), removing():
        torch.testing.assert_close(stream(model, tokens, 0), without(plain + v))
    assert not torch.allclose(without(plain) + v, without(plain + v), atol=0.1)


def test_answers_with_operations_equal_those_of_each_row_alone(model):
    vectors, questions = random_vectors(model), ["What now?", "Why do people travel so far?", "Go!"]
    names, numbers = ["project_out", "rotate", "clamp"], [1.0, 3.0, 2.0]
    with steer(model, vectors, coefficient=numbers, operation=names):
        together = generate(model, questions, max_new_tokens=6)
    for question, name, number, answer in zip(questions, names, numbers, together, strict=True):
        with steer(model, vectors, coefficient=number, operation=name):
            assert generate(model, question, max_new_tokens=6).token_ids == answer.token_ids
            ids = chat_ids(model, [[{"role": "user", "content": question}]]).input_ids
            for token in answer.token_ids:  # no cache: the whole text anew
                with torch.no_grad():
                    assert int(model(ids)[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_rows_of_one_generation_carry_operations_of_their_own(model):
    vectors, question = random_vectors(model), "Why do people travel so far?"
    rows = [
        SteeringRow(question, vectors, 2.0, operation="clamp"),
        SteeringRow("What now?", None),
        SteeringRow(question, vectors, 1.0, operation="project_out"),
        SteeringRow(question, vectors, 2.0),
    ]
    options = {"max_new_tokens": 6, "relative": False}
    together = generate_steered(model, rows, **options)
    for row, answer in zip(rows, together, strict=True):
        assert generate_steered(model, [row], **options)[0].token_ids == answer.token_ids
    with pytest.raises(ValueError, match="leaves the row as it is"):
        SteeringRow(question, vectors, operation="project_out")
    with pytest.raises(ValueError, match="operation must be one of"):
        SteeringRow(question, vectors, 1.0, operation="subtract")


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_without_vectors_and_coefficients_of_zero_are_bit_identical(model, name):
    vectors, tokens = random_vectors(model), pad_left(PROMPTS, 5)
    plain = run(model, tokens)
    with steer(model, [vectors, None, vectors], coefficient=[1.0, 1.0, 0.0], operation=name):
        steered = run(model, tokens)
    assert torch.equal(steered[1:], plain[1:]) and not torch.equal(steered[0], plain[0])


@pytest.mark.parametrize("name", OTHERS)
def test_vectors_of_closing_tokens_are_applied_at_these_alone(model, name):
    vectors, operation = own_vectors(model), OPERATIONS[name]
    questions = ["What now?", "Why do people travel so far?"]
    tokens = chat_ids(model, [[{"role": "user", "content": one}] for one in questions])
    plain, places = stream(model, tokens, 0), len(vectors.closing)
    names = [name, "add"]
    with steer(model, vectors, coefficient=1.5, operation=names, blocks=[0]):
        steered = stream(model, tokens, 0)
    assert torch.equal(steered[:, :-places], plain[:, :-places])
    for place in range(places):
        at = place - places
        delta = 1.5 * vectors.directions[0, place][None, None]
        expected = operation(plain[:1, at, None], delta)
        torch.testing.assert_close(steered[:1, at, None], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steered[1:, at, None], plain[1:, at, None] + delta)


def test_a_clamp_in_half_precision_is_exact_to_its_rounding(tmp_path):
    model = load_model(tiny.tiny_folder(tmp_path), device="cpu", dtype="bfloat16", check=False)
    vectors, tokens = random_vectors(model), pad_left(PROMPTS, 5)
    with steer(model, vectors, coefficient=3.0, operation="clamp"):
        after = stream(model, tokens, 1)
    assert after.dtype == torch.bfloat16
    projected = after.float() @ vectors.directions[1]
    torch.testing.assert_close(projected, torch.full_like(projected, 3.0), atol=0.05, rtol=0)


def test_a_function_is_an_operation_and_may_not_return_another_shape(model):
    vectors, tokens = random_vectors(model), pad_left(PROMPTS, 5)
    before = hook_count(model)
    with steer(model, vectors, coefficient=2.0, operation=lambda h, d: h - d):
        subtracted = run(model, tokens)
    with steer(model, vectors, coefficient=-2.0):
        torch.testing.assert_close(subtracted, run(model, tokens))
    with pytest.raises(ValueError, match="must return the residual stream"):
        with steer(model, vectors, coefficient=2.0, operation=lambda h, d: d):
            run(model, tokens)
    assert hook_count(model) == before


def test_what_cannot_be_meant_is_refused(model):
    vectors = random_vectors(model)
    for words, options in {
        "operation must be one of": {"operation": "subtract"},
        "operation is empty": {"operation": []},
        "operation has 2 entries for 3 rows": {
            "operation": ["add", "clamp"],
            "coefficient": [1.0] * 3,
        },
    }.items():
        with (
            pytest.raises(ValueError, match=words),
            steer(model, vectors, **{"coefficient": 1.0, **options}),
        ):
            pass
    with pytest.raises(TypeError, match="coefficient is needed"):
        with steer(model, vectors, operation="clamp"):
            pass
