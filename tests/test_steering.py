from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import hook_count, plain_hooks, random_vectors

from lenskit.models import Tokens, applied_edits, load_model, pad_left
from lenskit.steering import Intervention, steer

# What the plain hooks add is absolute.
steer = partial(steer, relative=False)
ARCHITECTURES = ["llama", "llama-gqa", "gpt2", "gpt_neox", "qwen2", "gemma2", "gemma3", "olmo2"]
PROMPTS = ([0, 40, 50, 60, 70, 80, 90], [0, 33, 44], [0, 111, 122, 133, 144])
NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]


def padded(*prompts) -> Tokens:
    return pad_left(prompts or PROMPTS, 5)


@torch.no_grad()
def run(model, tokens, **options):
    return model(tokens.input_ids, attention_mask=tokens.attention_mask, **options)


@torch.no_grad()
def residuals(model, tokens) -> list[torch.Tensor]:
    """The stream after each block, read by a hook that runs after those that steer."""
    seen = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value)) for name in NAMES]):
        run(model, tokens)
    return seen


@pytest.fixture
def model():
    return tiny.shared_model()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_changes_what_a_plain_hook_on_hugging_face_changes(architecture):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    vectors = random_vectors(model)
    for block, prompt in zip((0, 1, 2), PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad(), plain_hooks(reference, {block: 5.0 * vectors.directions[block]}):
            expected = reference(ids).logits
        with torch.no_grad(), steer(model, vectors, coefficient=5.0, blocks=[block]):
            steered = model(ids)
        torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-5)
        with torch.no_grad():
            assert (reference(ids).logits - expected).abs().max() > 0.1


def test_exactly_the_vector_is_added_at_the_chosen_block_and_nothing_before_it(model):
    vectors, tokens = random_vectors(model), padded()
    plain = residuals(model, tokens)
    with steer(model, vectors, coefficient=3.0, blocks=[1]):
        steered = residuals(model, tokens)
    assert torch.equal(steered[0], plain[0])
    assert torch.equal(steered[1], plain[1] + 3.0 * vectors.directions[1])
    assert not torch.allclose(steered[2], plain[2], atol=0.1)


def test_a_relative_coefficient_is_in_units_of_each_blocks_residual_norm(model):
    vectors = random_vectors(model)
    additions = {i: -0.5 * vectors.resid_norm[i] * v for i, v in enumerate(vectors.directions)}
    reference = tiny.reference_model(tiny.shared_folder())
    with torch.no_grad(), plain_hooks(reference, additions):
        expected = reference(torch.tensor([PROMPTS[0]])).logits
    with steer(model, vectors, coefficient=-0.5, relative=True):
        torch.testing.assert_close(run(model, padded(PROMPTS[0])), expected, atol=1e-4, rtol=1e-5)


def test_rows_with_their_own_coefficients_equal_the_same_rows_alone(model):
    vectors, tokens = random_vectors(model), padded()
    coefficients = [4.0, -2.0, 0.0]
    with steer(model, vectors, coefficient=torch.tensor(coefficients)):
        together = run(model, tokens)[:, -1]
    for row, (prompt, coefficient) in enumerate(zip(PROMPTS, coefficients, strict=True)):
        with steer(model, vectors, coefficient=coefficient):
            alone = run(model, padded(prompt))[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-5)


def test_rows_may_have_different_vectors_or_none(model):
    first, second = random_vectors(model, 1), random_vectors(model, 2)
    tokens = padded()
    plain = residuals(model, tokens)
    with steer(model, [first, None, second], coefficient=[2.0, 7.0, -3.0], blocks=[0]):
        steered = residuals(model, tokens)
    difference = torch.stack([2 * first.directions[0], torch.zeros(32), -3 * second.directions[0]])
    assert torch.equal(steered[0], plain[0] + difference[:, None])
    assert torch.equal(steered[2][1], plain[2][1])


@pytest.mark.parametrize("start", [1, 3, 5, 100])
@pytest.mark.parametrize("way", ["mask", "positions", "neither"])
def test_steering_starts_at_an_absolute_position_that_does_not_count_padding(model, start, way):
    vectors = random_vectors(model)
    tokens = padded() if way == "mask" else padded(PROMPTS[0])
    given = {
        "mask": {"attention_mask": tokens.attention_mask},
        "positions": {"position_ids": torch.arange(7)[None]},
        "neither": {},
    }[way]
    seen = []
    with steer(model, vectors, coefficient=2.0, blocks=[0], start=start), torch.no_grad():
        model.run_with_hooks(
            tokens.input_ids,
            fwd_hooks=[(NAMES[0], lambda value, hook: seen.append(value))],
            **given,
        )
        plain = []
    with torch.no_grad():
        model.run_with_hooks(
            tokens.input_ids,
            fwd_hooks=[(NAMES[0], lambda value, hook: plain.append(value))],
            **given,
        )
    for row, prompt in enumerate(PROMPTS[: len(tokens)]):
        padding = tokens.input_ids.shape[1] - len(prompt)
        for position in range(tokens.input_ids.shape[1]):
            steered = position - padding >= start
            expected = plain[0][row, position] + steered * 2.0 * vectors.directions[0]
            assert torch.equal(seen[0][row, position], expected)


@pytest.mark.parametrize("start", [0, 2, 4, 6])
def test_chunks_with_a_cache_equal_the_whole_text_at_once(model, start):
    vectors, tokens = random_vectors(model), padded()
    hf_model = model.original_model
    with torch.no_grad(), steer(model, vectors, coefficient=[3.0, -3.0, 1.0], start=start):
        whole = run(model, tokens)
        cache, parts = None, []
        for begin, end in ((0, 4), (4, 5), (5, 7)):
            mask = tokens.attention_mask[:, :end]
            output = hf_model(
                tokens.input_ids[:, begin:end],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, begin:],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    real = tokens.attention_mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-4, rtol=1e-5)


def test_chunks_without_a_mask_are_counted_from_the_cache(model):
    vectors, ids = random_vectors(model), torch.tensor([PROMPTS[0]])
    with torch.no_grad(), steer(model, vectors, coefficient=3.0, start=5):
        whole = model.original_model(ids).logits
        first = model.original_model(ids[:, :4], use_cache=True)
        second = model.original_model(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 4:], atol=1e-4, rtol=1e-5)


def test_a_composition_equals_the_sum_of_its_parts(model):
    first, second = random_vectors(model, 1), random_vectors(model, 2)
    tokens = padded()
    both = replace(first, directions=2.0 * first.directions - 1.5 * second.directions)
    with steer(model, both, coefficient=1.0):
        expected = run(model, tokens)
    with steer(model, [(first, 2.0), (second, -1.5)]):
        torch.testing.assert_close(run(model, tokens), expected, atol=1e-4, rtol=1e-5)
    with steer(model, [(first, 4.0), (second, -3.0)], coefficient=[0.5, 0.5, 0.5]):
        torch.testing.assert_close(run(model, tokens), expected, atol=1e-4, rtol=1e-5)
    with steer(model, [(first, [2.0, 2.0, 2.0]), (second, -1.5)]):
        torch.testing.assert_close(run(model, tokens), expected, atol=1e-4, rtol=1e-5)


def test_contexts_inside_one_another_add_up(model):
    first, second = random_vectors(model, 1), random_vectors(model, 2)
    tokens = padded()
    with steer(model, [(first, 2.0), (second, -1.5)]):
        expected = run(model, tokens)
    with steer(model, first, coefficient=2.0), steer(model, second, coefficient=[-1.5] * 3):
        assert len(applied_edits(model)) == 2
        torch.testing.assert_close(run(model, tokens), expected, atol=1e-4, rtol=1e-5)
    assert not applied_edits(model)


def test_a_coefficient_of_zero_changes_nothing_at_all(model):
    tokens = padded()
    plain = run(model, tokens)
    for options in ({"coefficient": 0.0}, {"coefficient": 0.0, "start": 2}):
        with steer(model, random_vectors(model), **options):
            assert torch.equal(run(model, tokens), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_vectors_are_cast_to_the_streams_dtype(dtype):
    model = load_model(tiny.shared_folder(), device="cpu", dtype=dtype, check=False)
    # One prompt without padding: in float64 the attention of padding is NaN, steered or not.
    vectors, tokens = random_vectors(model), padded(PROMPTS[0])
    plain = residuals(model, tokens)
    with steer(model, vectors, coefficient=3.0, blocks=[0]):
        steered = residuals(model, tokens)
    assert steered[0].dtype == dtype
    assert torch.equal(steered[0], plain[0] + (3.0 * vectors.directions[0].double()).to(dtype))


def test_what_an_earlier_hook_kept_is_not_altered(model):
    vectors, tokens = random_vectors(model), padded()
    plain = residuals(model, tokens)
    kept = []
    with (
        model.hooks(fwd_hooks=[(NAMES[0], lambda value, hook: kept.append(value))]),
        steer(model, vectors, coefficient=3.0),
    ):
        run(model, tokens)
    assert torch.equal(kept[0], plain[0])


def test_gradients_flow_through_a_steered_model(model):
    embedded = []

    def leaf(value, hook):
        embedded.append(value.detach().requires_grad_())
        return embedded[-1]

    with steer(model, random_vectors(model), coefficient=2.0, start=1):
        logits = model.run_with_hooks(
            torch.tensor([PROMPTS[0]]), fwd_hooks=[("blocks.0.hook_resid_pre", leaf)]
        )
    (gradient,) = torch.autograd.grad(logits[0, -1].max(), embedded)
    assert gradient.abs().sum() > 0


def test_no_hook_is_left_after_the_context_or_after_an_exception(model):
    vectors, tokens = random_vectors(model), padded()
    plain, before = run(model, tokens), hook_count(model)
    with steer(model, vectors, coefficient=2.0):
        assert hook_count(model) > before
    assert hook_count(model) == before
    with pytest.raises(RuntimeError, match="inside"), steer(model, vectors, coefficient=2.0):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="rows"), steer(model, vectors, coefficient=[1.0, 2.0]):
        run(model, tokens)
    with (
        pytest.raises(ValueError, match="blocks"),
        steer(model, vectors, coefficient=1.0, blocks=[9]),
    ):
        pass
    assert hook_count(model) == before
    assert not applied_edits(model)
    assert torch.equal(run(model, tokens), plain)


def test_vectors_of_another_model_are_refused(model):
    other = tiny.shared_model("llama")
    vectors = random_vectors(other)
    with pytest.raises(ValueError, match="tiny-llama:"), steer(model, vectors, coefficient=1.0):
        pass
    misshapen = random_vectors(model)
    misshapen = replace(misshapen, directions=misshapen.directions[:, :8])
    with pytest.raises(ValueError, match="d_model"), steer(model, misshapen, coefficient=1.0):
        pass


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, TypeError, "coefficient is needed"),
        ({"coefficient": float("nan")}, ValueError, "finite"),
        ({"coefficient": [1.0, float("inf")]}, ValueError, "finite"),
        ({"coefficient": torch.ones(2, 2)}, ValueError, r"shape \[2, 2\]"),
        ({"coefficient": []}, ValueError, "shape"),
        ({"coefficient": 1.0, "blocks": []}, ValueError, "blocks is empty"),
        ({"coefficient": 1.0, "blocks": [0, 3]}, ValueError, "from 0 to 2"),
        ({"coefficient": 1.0, "blocks": [-1]}, ValueError, "from 0 to 2"),
        ({"coefficient": 1.0, "blocks": [1, 1]}, ValueError, "different numbers"),
        ({"coefficient": 1.0, "start": -1}, ValueError, "start"),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(model, options, error, words):
    with pytest.raises(error, match=words), steer(model, random_vectors(model), **options):
        pass


def test_vectors_that_cannot_be_meant_are_named(model):
    vectors = random_vectors(model)
    broken = replace(vectors, directions=vectors.directions * float("nan"))
    pairs = [(vectors, [1.0, 2.0]), (vectors, 1.0)]
    for wrong, error, words in (
        (broken, ValueError, "not finite"),
        ([], ValueError, "vectors is empty"),
        ([vectors, vectors], ValueError, "3 numbers for 2 rows"),
        (pairs, ValueError, "different numbers"),
        ((vectors, 2.0, 1.0), TypeError, "got float"),
        ([vectors.directions.tolist()] * 3, TypeError, "got list"),
    ):
        with pytest.raises(error, match=words), steer(model, wrong, coefficient=[1.0, 1.0, 1.0]):
            pass


def test_a_start_without_a_way_to_count_positions_is_refused(model):
    ids = torch.tensor([PROMPTS[0]])
    bias = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="attention_mask"),
        steer(model, random_vectors(model), coefficient=1.0, start=2),
    ):
        model.original_model(ids, attention_mask=bias)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), vectors=st.integers(0, 4), blocks=st.integers(1, 3), data=st.data())
def test_deltas_are_the_weighted_sum_for_any_rows_in_any_order(rows, vectors, blocks, data):
    generator = torch.Generator().manual_seed(rows * 100 + vectors * 10 + blocks)
    directions = torch.randn(vectors, blocks, 6, generator=generator)
    # Whole numbers and zeros: most rows use few vectors.
    weights = torch.randint(-2, 3, (rows, vectors), generator=generator).double()
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6))
    planned = Intervention(directions, weights, tuple(range(blocks)))
    found = planned.deltas(torch.tensor(chosen))
    for place, row in enumerate([0] if rows == 1 else chosen):
        for block in range(blocks):
            expected = torch.zeros(6, dtype=torch.float64)
            for v in range(vectors):
                expected += weights[row, v] * directions[v, block].double()
            torch.testing.assert_close(found[block, place], expected)
