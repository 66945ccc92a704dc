from __future__ import annotations

from contextlib import contextmanager

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.capture import capture, for_each_pattern
from lenskit.models import Tokens, load_model, model_fingerprint
from lenskit.prompts import PromptSet, build_prompts

PREFIX = "Take on a cheerful mood."
STATEMENTS = [
    "Rain.",
    "Libraries should stay open on Sundays, and nobody should have to pay for it.",
    "Sun is fine.",
    "In 1984 the library was open to people who had nothing else to do in the morning.",
    "Is rain better?",
    "What is the scariest thing?",
]
CLOSE = dict(atol=1e-5, rtol=1e-5)


def prompts_for(model, **options) -> PromptSet:
    return build_prompts(model, PREFIX, **{"statements": STATEMENTS, **options})


def last_block(reference):
    """The last block of a Hugging Face model, whose output is taken before the final norm."""
    inner = reference.base_model
    inner = getattr(inner, "decoder", inner)
    return (inner.h if hasattr(inner, "h") else inner.layers)[-1]


def read_alone(reference, tokenizer, prompts: PromptSet, row: int):
    """Pattern rows and residuals of one prompt without padding, read from Hugging Face."""
    kept = {}

    def keep(module, arguments, output):
        kept["last"] = output[0] if isinstance(output, tuple) else output

    ids = prompts.tokens.input_ids[row][prompts.tokens.attention_mask[row].bool()]
    handle = last_block(reference).register_forward_hook(keep)
    with torch.no_grad():
        output = reference(ids[None], output_attentions=True, output_hidden_states=True)
    handle.remove()
    states = torch.stack([*output.hidden_states[1:-1], kept["last"]])[:, 0]
    patterns = torch.stack(output.attentions)[:, 0]
    prefix = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    starts = [i for i in range(len(ids)) if ids[i : i + len(prefix)].tolist() == prefix]
    assert len(starts) == int(prompts.has_prefix[row])
    return patterns, states, slice(starts[0], starts[0] + len(prefix)) if starts else None


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_capture_equals_hugging_face_on_each_prompt_alone(architecture):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    prompts = prompts_for(model)
    captured = capture(model, prompts, batch_size=4, progress=False)
    for row in range(len(prompts)):
        patterns, states, prefix = read_alone(reference, model.tokenizer, prompts, row)
        torch.testing.assert_close(captured.resid_post[row], states[:, -5:], atol=2e-5, rtol=1e-5)
        mass = captured.attention_to_prefix[row]
        if prefix is None:
            assert (mass == 0).all()
        else:
            expected = patterns[:, :, -5:, prefix].sum(dim=-1)
            torch.testing.assert_close(mass, expected, **CLOSE)


def test_a_capture_has_the_documented_shapes_and_types():
    model = tiny.shared_model()
    captured = capture(model, prompts_for(model), progress=False)
    assert captured.attention_to_prefix.shape == (6, 3, 4, 5)
    assert captured.resid_post.shape == (6, 3, 5, 32)
    for values in (captured.attention_to_prefix, captured.resid_post):
        assert values.dtype == torch.float32 and values.device.type == "cpu"
        assert not values.requires_grad
    assert captured.model == model_fingerprint(model)
    assert captured.candidates == tiny.CLOSING
    assert captured.layers == 3 and len(captured) == 6
    assert captured.attention_to_prefix[0].sum() > 0


statements = st.lists(
    st.text("ab cd.é", min_size=1, max_size=30).filter(lambda text: text.strip()),
    min_size=2,
    max_size=7,
)


@settings(max_examples=15, deadline=None)
@given(statements, st.integers(1, 9), st.randoms(use_true_random=False), st.integers(0, 5))
def test_batches_order_and_padding_do_not_change_a_capture(texts, batch_size, random, padding):
    model = tiny.shared_model()
    prompts = build_prompts(model, PREFIX, layout="paired", statements=texts, seed=None)
    alone = capture(model, prompts, batch_size=1, progress=False)

    order = list(range(len(prompts)))
    random.shuffle(order)
    shuffled = prompts.rows(order)
    fill = torch.full((len(prompts), padding), 5)
    padded = PromptSet(
        shuffled.concept,
        Tokens(
            torch.cat([fill, shuffled.tokens.input_ids], dim=1),
            torch.cat([fill * 0, shuffled.tokens.attention_mask], dim=1),
        ),
        torch.cat([fill > 5, shuffled.prefix_mask], dim=1),
        shuffled.has_prefix,
        shuffled.candidates,
        shuffled.statements,
        shuffled.pair,
    )
    other = capture(model, padded, batch_size=batch_size, progress=False)
    expected = alone.rows(order)
    torch.testing.assert_close(other.attention_to_prefix, expected.attention_to_prefix, **CLOSE)
    torch.testing.assert_close(other.resid_post, expected.resid_post, atol=2e-5, rtol=1e-5)


def test_rows_of_a_capture_keep_prompts_and_values_together():
    model = tiny.shared_model()
    captured = capture(model, prompts_for(model), progress=False)
    some = captured.rows([4, 1])
    assert some.prompts.statements == tuple(captured.prompts.statements[i] for i in (4, 1))
    assert torch.equal(some.resid_post, captured.resid_post[[4, 1]])
    assert torch.equal(some.attention_to_prefix, captured.attention_to_prefix[[4, 1]])
    positives = captured.rows(captured.prompts.has_prefix)
    assert torch.equal(positives.resid_post, captured.resid_post[0::2])


def test_bfloat16_is_reduced_in_float32():
    model = load_model(tiny.shared_folder(), device="cpu", dtype="bfloat16", check=False)
    prompts = prompts_for(model)
    captured = capture(model, prompts, progress=False)
    seen = torch.zeros_like(captured.attention_to_prefix)

    def visit(layer, rows, pattern, mask):
        keys = prompts.prefix_mask[rows, -pattern.shape[-1] :]
        for place, row in enumerate(rows.tolist()):
            seen[row, layer] = pattern[place].float()[..., keys[place]].sum(dim=-1)

    for_each_pattern(model, prompts.tokens, 5, visit, progress=False)
    assert captured.resid_post.dtype == torch.float32
    torch.testing.assert_close(captured.attention_to_prefix, seen)


def test_an_edit_in_place_later_in_the_model_does_not_reach_what_was_captured():
    model = tiny.shared_model()
    expected = capture(model, prompts_for(model), attention="eager", progress=False)

    def erase(resid, hook):
        return resid.zero_()

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", erase)]):
        captured = capture(model, prompts_for(model), progress=False)
    assert torch.equal(captured.resid_post[:, 1], expected.resid_post[:, 1])
    assert not torch.equal(captured.resid_post[:, 2], expected.resid_post[:, 2])


def test_the_unembedding_is_never_run():
    model = tiny.shared_model()

    def refuse(value, hook):
        raise AssertionError("logits were computed")

    with model.hooks(fwd_hooks=[("unembed.hook_in", refuse)]):
        capture(model, prompts_for(model), progress=False)


def test_a_capture_leaves_no_hook_behind_even_after_an_error():
    model = tiny.shared_model()

    def fail(layer, rows, pattern, mask):
        raise KeyError("from the visitor")

    with pytest.raises(KeyError, match="from the visitor"):
        for_each_pattern(model, prompts_for(model).tokens, 5, fail, progress=False)
    capture(model, prompts_for(model), progress=False)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@contextmanager
def memory_for(model, prompts: int, error: Exception):
    """A model that runs out of memory on batches of more prompts than this."""
    sizes = []

    def allocate(value, hook):
        sizes.append(len(value))
        if len(value) > prompts:
            raise error

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", allocate)]):
        yield sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_batches_are_halved_on_out_of_memory_and_the_capture_is_the_same(error):
    model = tiny.shared_model()
    prompts = prompts_for(model)
    expected = capture(model, prompts, progress=False)
    with memory_for(model, 2, error) as sizes:
        captured = capture(model, prompts, batch_size=6, progress=False)
    assert sizes == [6, 3, 2, 2, 2]
    torch.testing.assert_close(captured.resid_post, expected.resid_post, **CLOSE)
    torch.testing.assert_close(captured.attention_to_prefix, expected.attention_to_prefix, **CLOSE)


def test_out_of_memory_on_a_single_prompt_is_raised():
    model = tiny.shared_model()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with memory_for(model, 0, error) as sizes, pytest.raises(torch.OutOfMemoryError):
        capture(model, prompts_for(model), batch_size=4, progress=False)
    assert sizes == [3, 2, 1]


def test_any_other_runtime_error_is_raised_at_once():
    model = tiny.shared_model()
    with memory_for(model, 2, RuntimeError("shapes differ")) as sizes:
        with pytest.raises(RuntimeError, match="shapes differ"):
            capture(model, prompts_for(model), batch_size=6, progress=False)
    assert sizes == [6]


@pytest.mark.parametrize(
    ("hook", "value", "message"),
    [
        ("blocks.1.hook_resid_post", float("inf"), "resid_post of block 1"),
        ("blocks.2.attn.hook_pattern", float("nan"), "attention of block 2"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_block(hook, value, message):
    model = tiny.shared_model()

    def spoil(tensor, hook):
        return torch.full_like(tensor, value)

    with model.hooks(fwd_hooks=[(hook, spoil)]), pytest.raises(ValueError, match=message):
        capture(model, prompts_for(model), progress=False)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        capture(model, prompts_for(model), batch_size=batch_size, progress=False)


def test_a_visitor_sees_every_pattern_row_of_the_model():
    model = tiny.shared_model()
    reference = tiny.reference_model(tiny.shared_folder())
    prompts = prompts_for(model)
    visited = []

    def visit(layer, rows, pattern, mask):
        assert pattern.shape == (len(rows), 4, 3, mask.shape[1])
        assert torch.equal(mask, prompts.tokens.attention_mask[rows, -mask.shape[1] :].bool())
        assert mask.any(dim=0).all()
        for place, row in enumerate(rows.tolist()):
            visited.append((layer, row))
            patterns, _, _ = read_alone(reference, model.tokenizer, prompts, row)
            real = pattern[place][..., mask[place]]
            torch.testing.assert_close(real, patterns[layer][:, -3:], **CLOSE)
            assert (pattern[place][..., ~mask[place]] == 0).all()

    for_each_pattern(model, prompts.tokens, 3, visit, batch_size=4, progress=False)
    assert sorted(visited) == [(layer, row) for layer in range(3) for row in range(6)]


def test_only_the_blocks_asked_for_are_visited_and_later_ones_not_run():
    model = tiny.shared_model()
    layers = []

    def refuse(value, hook):
        raise AssertionError("a later block was run")

    def visit(layer, rows, pattern, mask):
        layers.append(layer)

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", refuse)]):
        for_each_pattern(model, prompts_for(model).tokens, 1, visit, progress=False, blocks=[1, 0])
    assert layers == [0, 1]


@pytest.mark.parametrize("blocks", [[], [3], [-1]])
def test_blocks_that_do_not_exist_are_refused(blocks):
    model = tiny.shared_model()
    tokens = prompts_for(model).tokens
    with pytest.raises(ValueError, match="blocks (is empty|must be different)"):
        for_each_pattern(model, tokens, 1, print, progress=False, blocks=blocks)


@pytest.mark.parametrize("number", [0, 1000])
def test_more_candidates_than_tokens_are_refused(number):
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="number_of_candidates"):
        for_each_pattern(model, prompts_for(model).tokens, number, print, progress=False)


def test_nothing_is_written_when_progress_is_off(capsys):
    model = tiny.shared_model()
    capture(model, prompts_for(model), progress=False)
    assert capsys.readouterr() == ("", "")
