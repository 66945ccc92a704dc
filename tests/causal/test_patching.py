"""Patching many sites in one batch equals one forward pass with a plain hook for each of them."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import decoder_layers, hook_count

import lenskit as lk
from lenskit.causal.runs import HOOKS

CLEAN = [0, 40, 50, 60, 70, 80]
CORRUPT = [0, 33, 50, 61, 72, 80]
TARGET, OTHER = [90, 100], [90, 120]
ARCHITECTURES = ["llama-gqa", "gpt2", "gpt_neox", "gemma3", "mixtral"]
OTHERS = [
    name
    for name in tiny.ARCHITECTURES | tiny.FURTHER
    if name not in (*ARCHITECTURES, *tiny.REFUSED)
]
EVERY = [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
EXACT = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture
def model():
    return tiny.shared_model()


@torch.no_grad()
def kept(model, ids, name):
    """What a hook sees of one prompt."""
    found = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: found.append(heads_of(value, name)))]):
        model(torch.tensor([ids]))
    return found[0].clone()


def heads_of(value, name):
    """The heads' outputs, of which the bridge cuts some in pieces of another width."""
    return value.flatten(2).unflatten(2, (4, -1)) if name.endswith("hook_z") else value


@torch.no_grad()
def one_site(model, ids, name, index, new, *, more=()):
    """The logits of one prompt, whose activations at ``index`` a plain hook replaces."""

    def put(value, hook):
        changed = heads_of(value.clone(), name)
        changed[(0, *index)] = new
        return changed.view(value.shape)

    with model.hooks(fwd_hooks=[(name, put)]):
        return model(torch.tensor([[*ids, *more]]))[0]


def answer_log_probability(logits, answer):
    chances = logits[-len(answer) :].log_softmax(-1)
    return sum(float(chances[i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("architecture", EVERY)
def test_every_site_equals_a_forward_pass_of_its_own(architecture):
    model = tiny.shared_model(architecture)
    for at in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        found = lk.causal.patch(model, CORRUPT, CLEAN, target=TARGET, at=at)
        assert found.values.shape == (3, 6) and found.axes == ("block", "pos")
        for block in range(3):
            name = f"blocks.{block}.{HOOKS[at]}"
            clean = kept(model, CLEAN, name)[0]
            for place in (0, 1, 4, 5):
                logits = one_site(model, CORRUPT, name, (place,), clean[place], more=TARGET[:-1])
                expected = answer_log_probability(logits, TARGET)
                assert found.values[block, place].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_every_head_equals_a_forward_pass_of_its_own(architecture):
    model = tiny.shared_model(architecture)
    found = lk.causal.patch(model, CORRUPT, CLEAN, target=TARGET, against=OTHER, at="z")
    assert found.values.shape == (3, 4) and found.axes == ("block", "head")
    for block in range(3):
        name = f"blocks.{block}.attn.hook_z"
        clean = kept(model, CLEAN, name)[0]
        for head in range(4):
            where = (slice(0, 6), head)
            logits = one_site(model, CORRUPT, name, where, clean[:, head], more=TARGET[:1])[-1]
            expected = float(logits[100] - logits[120])
            assert found.values[block, head].item() == pytest.approx(expected, abs=1e-5)


def test_the_residual_stream_is_patched_as_a_hook_on_hugging_face_patches_it(model):
    reference = tiny.reference_model(tiny.shared_folder())
    found = lk.causal.patch(model, CORRUPT, CLEAN, target=[90])
    for block, layer in enumerate(decoder_layers(reference)):
        seen = []

        def read(module, inputs, output, seen=seen):
            seen.append((output[0] if isinstance(output, tuple) else output).clone())

        handle = layer.register_forward_hook(read)
        with torch.no_grad():
            reference(torch.tensor([CLEAN]))
        handle.remove()
        for place in range(6):

            def put(module, inputs, output, place=place, seen=seen):
                state = output[0] if isinstance(output, tuple) else output
                state[0, place] = seen[0][0, place]
                return output

            handle = layer.register_forward_hook(put)
            with torch.no_grad():
                logits = reference(torch.tensor([CORRUPT])).logits[0, -1]
            handle.remove()
            expected = float(logits.log_softmax(-1)[90])
            assert found.values[block, place].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_all_that_enters_the_first_block_patched_is_the_other_prompt(architecture):
    model = tiny.shared_model(architecture)
    everything = dict(at="resid_pre", blocks=[0], positions=[range(6)])
    for target, against in ((TARGET, None), (TARGET, OTHER), (None, None)):
        found = lk.causal.patch(model, CORRUPT, CLEAN, target=target, against=against, **everything)
        assert found.values.item() == pytest.approx(found.source, abs=1e-5)
        assert abs(found.plain - found.source) > 1e-5


def test_patching_with_itself_changes_nothing_and_the_last_position_of_the_last_block_all(model):
    same = lk.causal.patch(model, CLEAN, CLEAN, target=TARGET)
    torch.testing.assert_close(same.effects, torch.zeros(3, 6), **EXACT)
    found = lk.causal.patch(model, CORRUPT, CLEAN, target=[90])
    assert found.values[2, 5].item() == pytest.approx(found.source, abs=1e-5)
    # Both prompts have the same first token.
    torch.testing.assert_close(found.effects[:, 0], torch.zeros(3), **EXACT)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_pair_in_a_padded_batch_equals_the_pair_alone(lengths, batch_size, seed):
    model = tiny.shared_model()
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randint(6, 420, (2, length), generator=generator).tolist() for length in lengths]
    targets = [torch.randint(6, 420, (1 + i,), generator=generator).tolist() for i in range(3)]
    targets = targets[: len(pairs)]
    together = lk.causal.patch_pairs(
        model, pairs, targets=targets, at="attn_out", batch_size=batch_size
    )
    for pair, target, found in zip(pairs, targets, together, strict=True):
        alone = lk.causal.patch(model, *pair, target=target, at="attn_out")
        torch.testing.assert_close(found.values, alone.values, **EXACT)
        assert found.source == pytest.approx(alone.source, abs=1e-5)


def test_windows_of_blocks_and_spans_of_positions_are_patched_together(model):
    found = lk.causal.patch(
        model, CORRUPT, CLEAN, target=[90], at="mlp_out", blocks=[[0, 1], 2], positions=[[1, -1]]
    )
    clean = [kept(model, CLEAN, f"blocks.{block}.hook_mlp_out")[0] for block in range(2)]

    def put(value, hook):
        value = value.clone()
        value[0, [1, 5]] = clean[int(hook.name.split(".")[1])][[1, 5]]
        return value

    hooks = [(f"blocks.{block}.hook_mlp_out", put) for block in range(2)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        expected = model(torch.tensor([CORRUPT]))[0, -1].log_softmax(-1)[90]
    assert found.values[0, 0].item() == pytest.approx(float(expected), abs=1e-5)
    assert found.blocks == ((0, 1), (2,)) and found.places == ((1, 5),)
    assert "blocks 0-1, positions 1, 5" in found.site(0, 0)


def test_prompts_of_different_lengths_are_compared_over_the_end_that_they_share(model):
    longer = [0, 7, 8, *CORRUPT[3:]]
    found = lk.causal.patch(model, longer[1:], [9, *longer], target=[90], at="resid_post")
    assert found.places == tuple((place,) for place in range(5))
    shorter = lk.causal.patch(model, [0, 70, 80], [0, 40, 41, 70, 80], target=[90])
    assert shorter.places == ((1,), (2,))
    clean = kept(model, [0, 40, 41, 70, 80], "blocks.1.hook_resid_post")[0, 3]
    logits = one_site(model, [0, 70, 80], "blocks.1.hook_resid_post", (1,), clean)[-1]
    expected = float(logits.log_softmax(-1)[90])
    assert shorter.values[1, 0].item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="no counterpart"):
        lk.causal.patch(model, [0, 70, 80], [0, 40, 41, 70, 80], target=[90], positions=[0])
    with pytest.raises(ValueError, match="end with different ones"):
        lk.causal.patch(model, [0, 70], [0, 40, 41], target=[90])


def test_mean_ablation_puts_in_the_mean_over_the_tokens_of_other_prompts(model):
    prompts = [CLEAN, [0, 99, 98]]
    name = "blocks.1.hook_mlp_out"
    rows = torch.cat([kept(model, ids, name)[0, 1:] for ids in prompts])
    found = lk.causal.patch(model, CORRUPT, lk.causal.Mean(prompts), target=[90], at="mlp_out")
    logits = one_site(model, CORRUPT, name, (3,), rows.mean(0))[-1]
    assert found.values[1, 3].item() == pytest.approx(float(logits.log_softmax(-1)[90]), abs=1e-5)
    assert math.isnan(found.source)
    with pytest.raises(ValueError, match="nothing can be restored"):
        _ = found.restored

    by_position = lk.causal.Mean([CLEAN, CORRUPT], by_position=True)
    found = lk.causal.patch(model, CORRUPT, by_position, target=[90], at="mlp_out")
    mean = (kept(model, CLEAN, name) + kept(model, CORRUPT, name))[0] / 2
    logits = one_site(model, CORRUPT, name, (3,), mean[3])[-1]
    assert found.values[1, 3].item() == pytest.approx(float(logits.log_softmax(-1)[90]), abs=1e-5)
    with pytest.raises(ValueError, match="6 tokens"):
        lk.causal.patch(
            model, CORRUPT, lk.causal.Mean([[0, 9]], by_position=True), target=[90], at="mlp_out"
        )


def test_noise_depends_on_its_seed_alone_and_none_changes_nothing(model):
    def noisy(scale, seed, **options):
        noise = lk.causal.Noise(scale, seed)
        return lk.causal.patch(model, CORRUPT, noise, target=[90], **options).values

    assert torch.equal(noisy(1.0, 3, batch_size=18), noisy(1.0, 3, batch_size=18))
    torch.testing.assert_close(noisy(1.0, 3, batch_size=5), noisy(1.0, 3), **EXACT)
    assert not torch.allclose(noisy(1.0, 3), noisy(1.0, 4), atol=1e-3)
    plain = lk.causal.patch(model, CORRUPT, CLEAN, target=[90]).plain
    torch.testing.assert_close(noisy(0.0, 0), torch.full((3, 6), plain), **EXACT)


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
def test_a_noised_prompt_is_the_prompt_with_noise_on_its_embeddings(architecture):
    model = tiny.shared_model(architecture)
    noised = lk.causal.Noised(CLEAN, positions=[1, -2], scale=3.0, seed=4)
    found = lk.causal.patch(model, noised, CLEAN, target=TARGET)
    name = "blocks.0.hook_resid_pre"
    embedded = kept(model, CLEAN, name)[0]
    drawn = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(4))
    corrupt = embedded.clone()
    corrupt[[1, 4]] += 3.0 * embedded[1:].std() * drawn[[1, 4]]
    where = (slice(0, 6),)
    logits = one_site(model, CLEAN, name, where, corrupt, more=TARGET[:-1])
    assert found.plain == pytest.approx(answer_log_probability(logits, TARGET), abs=1e-5)

    def enters(value, hook):
        value = value.clone()
        value[0, :6] = corrupt
        return value

    clean = kept(model, CLEAN, "blocks.1.hook_resid_post")[0]
    with model.hooks(fwd_hooks=[(name, enters)]):
        logits = one_site(model, CLEAN, "blocks.1.hook_resid_post", (4,), clean[4], more=TARGET[:1])
    expected = answer_log_probability(logits, TARGET)
    assert found.values[1, 4].item() == pytest.approx(expected, abs=1e-5)
    # Position 0 and all that is not noised is restored by itself; all of it restores the answer.
    everything = dict(at="resid_pre", blocks=[0], positions=[range(6)])
    whole = lk.causal.patch(model, noised, CLEAN, target=TARGET, **everything)
    assert whole.values.item() == pytest.approx(whole.source, abs=1e-5)
    pairs = [(noised, CLEAN), (CLEAN, noised), ([0, 9, 8], [0, 7, 8])]
    together = lk.causal.patch_pairs(model, pairs, targets=[TARGET] * 3, batch_size=7)
    torch.testing.assert_close(together[0].values, found.values, **EXACT)
    assert together[1].source == pytest.approx(found.plain, abs=1e-5)
    with pytest.raises(TypeError, match="noised twice"):
        lk.causal.patch(model, lk.causal.Noised(noised), CLEAN, target=[90])


def test_a_function_of_block_and_values_is_a_source_too(model):
    found = lk.causal.patch(
        model, CORRUPT, lambda block, values: values * 0, target=[90], at="attn_out"
    )
    logits = one_site(model, CORRUPT, "blocks.2.hook_attn_out", (5,), 0.0)[-1]
    assert found.values[2, 5].item() == pytest.approx(float(logits.log_softmax(-1)[90]), abs=1e-5)
    with pytest.raises(ValueError, match="must return values of shape"):
        lk.causal.patch(model, CORRUPT, lambda block, values: values[0], target=[90])
    with pytest.raises(ValueError, match="not finite"):
        lk.causal.patch(model, CORRUPT, lambda block, values: values / 0, target=[90])


def test_without_a_target_the_measure_is_the_likeness_of_the_next_token(model):
    found = lk.causal.patch(model, CORRUPT, CLEAN)
    with torch.no_grad():
        clean, corrupt = (model(torch.tensor([ids]))[0, -1] for ids in (CLEAN, CORRUPT))
    expected = -torch.nn.functional.kl_div(
        corrupt.log_softmax(-1), clean.log_softmax(-1), reduction="sum", log_target=True
    )
    assert found.plain == pytest.approx(float(expected), abs=1e-5)
    assert found.source == pytest.approx(0, abs=1e-6)
    assert found.values[2, 5].item() == pytest.approx(0, abs=1e-5)


def test_a_function_of_the_next_tokens_logits_is_a_target_too(model):
    def greatest(logits):
        return logits.amax(-1)

    found = lk.causal.patch(model, CORRUPT, CLEAN, target=greatest)
    assert found.measure == "greatest"
    with torch.no_grad():
        expected = model(torch.tensor([CORRUPT]))[0, -1].max().item()
    assert found.plain == pytest.approx(expected, abs=1e-5)


def test_text_is_put_into_the_chat_template_and_an_answer_behind_it(model):
    found = lk.causal.patch(model, "What do you like?", "What do you love?", target="spiders")
    ids = lk.chat_ids(model, [[{"role": "user", "content": "What do you like?"}]]).input_ids[0]
    answer = model.tokenizer("spiders", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids.tolist(), *answer[:-1]]]))[0]
    assert found.plain == pytest.approx(answer_log_probability(logits, answer), abs=1e-4)
    messages = [{"role": "user", "content": "What do you like?"}]
    same = lk.causal.patch(model, messages, "What do you love?", target=answer)
    torch.testing.assert_close(same.values, found.values, **EXACT)


def test_spans_of_text_are_positions_too(model):
    question, other = "What do you like at night?", "What do you love at night?"
    span = lk.span(model, question, "at night")
    options = {"target": "spiders", "blocks": [1]}
    found = lk.causal.patch(model, question, other, positions=[span, -1], **options)
    same = lk.causal.patch(model, question, other, positions=[span.positions, -1], **options)
    assert torch.equal(found.values, same.values) and found.places[0] == span.positions
    alone = lk.causal.patch(model, question, other, positions=span, **options)
    torch.testing.assert_close(alone.values, found.values[:, :1], **EXACT)
    with pytest.raises(ValueError, match="of another prompt"):
        lk.causal.patch(model, other, question, positions=[span], **options)


def test_inside_steer_the_steered_model_is_patched_and_nothing_is_left_after_an_error(model):
    before = hook_count(model)
    additions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with lk.steer(model, additions):
        found = lk.causal.patch(model, CORRUPT, CLEAN, target=[90])
        with torch.no_grad():
            logits = model(torch.tensor([CORRUPT]))[0, -1]
    assert found.plain == pytest.approx(float(logits.log_softmax(-1)[90]), abs=1e-5)

    def fails(logits):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lk.causal.patch(model, CORRUPT, CLEAN, target=fails)
    assert hook_count(model) == before


def test_what_cannot_be_meant_is_refused(model):
    def patched(**options):
        return lk.causal.patch(model, CORRUPT, CLEAN, **{"target": [90], **options})

    for message, options in {
        "at must be one of": {"at": "attn"},
        "blocks must be": {"blocks": [3]},
        "blocks is empty": {"blocks": []},
        "positions must be from": {"positions": [6]},
        "positions must be different": {"positions": [[1, 1]]},
        "begin alike": {"against": [90, 91]},
        "against needs a target": {"target": None, "against": [90]},
        "a token id of target": {"target": [420]},
        "target has no tokens": {"target": ""},
        "batch_size": {"batch_size": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            patched(**options)
    with pytest.raises(ValueError, match="target is needed"):
        lk.causal.patch(model, CORRUPT, lk.causal.Noise())
    with pytest.raises(ValueError, match="one for each of 1 pairs"):
        lk.causal.patch_pairs(model, [(CORRUPT, CLEAN)], targets=[])
    with pytest.raises(TypeError, match="prompt must be"):
        lk.causal.patch(model, [], CLEAN, target=[90])


def test_heads_are_told_apart_where_values_are_wider_than_keys():
    model = tiny.shared_model("deepseek_v3")
    found = lk.causal.patch(
        model, CORRUPT, lambda block, values: values * 0, target=[90], at="z", blocks=[1]
    )

    def no_attention(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 2] = 0
        return pattern

    hooks = [("blocks.1.attn.hook_pattern", no_attention)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(torch.tensor([CORRUPT]))[0, -1]
    assert found.values[0, 2].item() == pytest.approx(float(logits.log_softmax(-1)[90]), abs=1e-5)
    slope = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="z")
    assert slope.values.shape == (3, 4)


def test_a_result_shows_its_axes_and_its_greatest_sites_and_draws_a_map(model):
    found = lk.causal.patch(model, "What do you like?", "What do you love?", target="I")
    row, column = found.top(1)[0]
    assert found.effects.abs().argmax() == row * found.values.shape[1] + column
    text = repr(found)
    assert "block 3 × pos" in text and "log-probability of 'I'" in text
    assert len(found.names) == found.values.shape[1] and "\n\n" in found.names
    assert "<table>" in found._repr_html_()
    figure = found.figure(restored=True)
    assert figure._repr_png_() and "restored share" in figure.alt
    heads = lk.causal.patch(model, CORRUPT, CLEAN, target=[90], at="z")
    assert heads.names[3] == "head 3" and "head 3" in heads.site(1, 3)
    assert "by block (3) and head (4)" in heads.figure().alt
