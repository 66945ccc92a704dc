from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import families
import pytest
import tiny
import torch

import lenskit.conformance.checks
from lenskit.conformance.checks import (
    QUESTIONS,
    Result,
    batch_composition,
    candidate_tokens,
    captures,
    check,
    conformance,
    left_padding,
    long_prompts,
    read,
    result_table,
    special_tokens_once,
    steered_generation,
    steering,
)
from lenskit.models import ModelCheckError, load_model, load_tokenizer
from lenskit.models.reference import decoder_layers
from lenskit.models.templates import prepare_tokenizer
from lenskit.steering import steer

USABLE = [name for name in tiny.ARCHITECTURES | tiny.FURTHER if name not in tiny.REFUSED]
MEASURED = {
    "left padding",
    "batch composition",
    "attention to the prefix",
    "residual stream",
    "steering",
    "steered generation",
}
CHECKS = {
    "hooks fire",
    "edits of hook_resid_post",
    "edits of attn.hook_attn_scores",
    "edits of attn.hook_pattern",
    "special tokens",
    "candidate tokens",
    "long prompts",
} | MEASURED


def opened(folder, dtype=torch.float32):
    """A loaded model and the readings of a separately loaded one."""
    readings = read(tiny.reference_model(folder, dtype), load_tokenizer(str(folder)))
    return load_model(folder, device="cpu", dtype=dtype, check="hooks"), readings


@cache
def pair():
    return opened(tiny.shared_folder())


@pytest.mark.parametrize("architecture", USABLE)
def test_everything_holds_on_every_architecture(architecture, tmp_path):
    model, readings = opened(tiny.tiny_folder(tmp_path, architecture, uneven=True))
    results = conformance(model, readings)
    assert {result.name for result in results} == CHECKS
    fails = {result.name for result in results if not result.holds}
    discarded = {"edits of attn.hook_attn_scores", "edits of attn.hook_pattern"}
    expected = {"long prompts"} if architecture == "glm_moe_dsa" else set()
    assert fails == (discarded if architecture in tiny.DISCARD_EDITS else expected)
    assert not any(result.needed for result in results if not result.holds)
    errors = {result.name: result.error for result in results if result.error is not None}
    assert set(errors) == MEASURED
    assert max(errors.values()) <= 1e-5
    assert errors["steered generation"] == 0
    # The checks would say little of a model that answers everything with the same token.
    assert len(set(readings.written.flatten().tolist())) > 4
    assert readings.plain.attention_to_prefix[0::2].max() > 1e-3


@pytest.mark.parametrize(
    "architecture",
    ["mistral-window", "gemma2", "gemma3", "gpt_oss", "olmo3", "cohere2", "gpt_neo"],
)
def test_answers_longer_than_the_window_are_steered_alike(architecture, tmp_path):
    name = "window_size" if architecture == "gpt_neo" else "sliding_window"
    folder = tiny.tiny_folder(tmp_path, architecture, uneven=True, **{name: 12})
    model, readings = opened(folder)
    assert readings.prompts.tokens.lengths.min() > 2 * 12
    assert [each for each in conformance(model, readings) if each.needed and not each.holds] == []


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mamba", "patterns for 0 of its 3 blocks.*Recurrent"),
        ("jamba", "patterns for 1 of its 3 blocks.*Recurrent"),
        ("rwkv", "hook_pattern does not fire in block.* no softmax attention"),
        ("biogpt", r"TransformerLens cannot open .*BioGptForCausalLM.*config\.$"),
        ("t5", "is not a causal language model"),
    ],
)
def test_what_cannot_be_supported_is_refused_on_loading_with_the_reason(
    architecture, reason, tmp_path
):
    with pytest.raises(ModelCheckError, match=reason):
        load_model(tiny.tiny_folder(tmp_path, architecture), device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "architecture",
    [
        "llama-gqa",
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "olmo2", "qwen3_moe")),
    ],
)
def test_everything_holds_in_half_precision_to_its_rounding(architecture, dtype, tmp_path):
    model, readings = opened(tiny.tiny_folder(tmp_path, architecture, uneven=True), dtype)
    assert model.original_model.dtype == dtype
    assert [result for result in conformance(model, readings) if not result.holds] == []


def test_without_readings_only_what_needs_none_is_checked():
    names = {result.name for result in conformance(pair()[0])}
    compared = {"attention to the prefix", "residual stream", "steering", "steered generation"}
    assert names == CHECKS - compared


def test_nothing_is_left_on_the_models():
    model, readings = pair()
    reference = tiny.reference_model(tiny.shared_folder())
    read(reference, model.tokenizer)
    conformance(model, readings)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    hooks = [hook for module in reference.modules() for hook in module._forward_hooks.values()]
    # Hugging Face's own, by which it returns hidden states, stay for good.
    assert not [hook for hook in hooks if "lenskit" in hook.__module__]


def test_the_last_block_is_read_before_the_final_norm():
    reference = tiny.reference_model(tiny.shared_folder())
    readings = read(reference, load_tokenizer(str(tiny.shared_folder())))
    row = readings.prompts.rows([1]).tokens.trimmed()
    with torch.no_grad():
        states = reference(row.input_ids, output_hidden_states=True).hidden_states
        normed = reference.model.norm(readings.plain.resid_post[1, -1])
    torch.testing.assert_close(normed, states[-1][0, -normed.shape[0] :], atol=1e-5, rtol=1e-5)
    assert (readings.plain.resid_post[1, -1] - normed).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gptj", "qwen2_moe"])
def test_the_blocks_of_a_plain_model_are_found(architecture):
    layers = decoder_layers(tiny.reference_model(tiny.shared_folder(architecture)))
    assert len(layers) == 3
    assert "Expert" not in type(layers[0]).__name__


def one(results: list[Result]) -> Result:
    assert len(results) == 1
    return results[0]


def test_other_weights_are_noticed_by_all_that_compare(tmp_path):
    other, readings = tiny.tiny_folder(tmp_path, seed=1), pair()[1]
    model = load_model(other, device="cpu", check=False)
    results = [*captures(model, readings), *steering(model, readings)]
    assert all(not result.holds and result.error > 0.1 for result in results)
    assert not one(steered_generation(model, readings)).holds


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_altered_block_is_noticed(block):
    model, readings = pair()

    def alter(resid, hook):
        return resid * (1 + 1e-4)

    with model.hooks(fwd_hooks=[(f"blocks.{block}.hook_resid_post", alter)]):
        _, stream = captures(model, readings)
    assert not stream.holds and 1e-5 < stream.error < 1e-2


def test_an_altered_pattern_is_noticed():
    model, readings = pair()

    def alter(pattern, hook):
        return pattern.roll(1, dims=1)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", alter)]):
        attention, _ = captures(model, readings)
    assert not attention.holds and "off by" in attention.meaning


def test_a_model_that_counts_padding_is_noticed():
    model, _ = pair()

    def count(resid, hook):
        return resid + 1e-3 * torch.arange(resid.shape[1])[None, :, None]

    assert one(left_padding(model)).holds
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", count)]):
        assert not one(left_padding(model)).holds
        assert not one(batch_composition(model)).holds


def test_a_model_that_mixes_rows_is_noticed():
    model, _ = pair()

    def mix(resid, hook):
        return resid + 1e-3 * resid.mean(dim=0, keepdim=True)

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", mix)]):
        assert one(left_padding(model)).holds
        assert not one(batch_composition(model)).holds


def test_values_that_are_no_numbers_do_not_hold():
    model, _ = pair()

    def spoil(resid, hook):
        return resid * float("nan")

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", spoil)]):
        assert one(left_padding(model)).error == float("inf")


def test_steering_by_another_amount_or_place_is_noticed(monkeypatch):
    model, readings = pair()
    more = replace(readings, directions=1.01 * readings.directions)
    assert one(steering(model, more)).error == pytest.approx(0.01, rel=0.5)

    def elsewhere(model, vectors, **options):
        return steer(model, vectors, **{**options, "blocks": [0]})

    monkeypatch.setattr(lenskit.conformance.checks, "steer", elsewhere)
    result = one(steering(model, readings))
    assert not result.holds and "earlier" in result.meaning


def test_steering_that_does_nothing_is_noticed(monkeypatch):
    @contextmanager
    def nothing(model, vectors, **options):
        yield

    monkeypatch.setattr(lenskit.conformance.checks, "steer", nothing)
    model, readings = pair()
    assert one(steering(model, readings)).error == pytest.approx(1)
    assert not one(steered_generation(model, readings)).holds


def test_steering_of_the_prompt_alone_is_noticed_in_generation(monkeypatch):
    @contextmanager
    def prompt_only(model, vectors, *, coefficient, relative):
        weights = torch.tensor(coefficient)[:, None, None]

        def adder(block):
            def add(resid, hook):
                step = vectors.resid_norm[block] * vectors.directions[block]
                return resid + weights * step if resid.shape[1] > 1 else resid

            return add

        hooks = [(f"blocks.{block}.hook_resid_post", adder(block)) for block in range(3)]
        with model.hooks(fwd_hooks=hooks):
            yield

    monkeypatch.setattr(lenskit.conformance.checks, "steer", prompt_only)
    model, readings = pair()
    assert one(steering_of_first_tokens(readings, model)).holds
    assert not one(steered_generation(model, readings)).holds


def steering_of_first_tokens(readings, model):
    """The generation check of one token, which the prompt alone decides."""
    first = replace(readings, written=readings.written[:, :1], scores=readings.scores[:, :1])
    return steered_generation(model, first)


def test_a_tie_between_tokens_is_no_failure():
    model, readings = pair()
    scores = readings.scores.clone()
    rows = torch.arange(len(QUESTIONS))
    other = (readings.written[:, 0] + 1) % scores.shape[-1]
    scores[rows, 0, other] = scores[rows, 0].max(dim=-1).values
    written = readings.written.clone()
    written[:, 0] = other
    result = one(steered_generation(model, replace(readings, written=written, scores=scores)))
    assert result.holds and result.error == 0


def test_a_doubled_special_token_is_noticed(monkeypatch):
    model, _ = pair()
    assert one(special_tokens_once(model)).holds
    real = lenskit.conformance.checks.conversation_ids

    def doubled(tokenizer, conversations):
        tokens = real(tokenizer, conversations)
        ids = torch.cat([tokens.input_ids[:, :1], tokens.input_ids], dim=1)
        return replace(tokens, input_ids=ids, attention_mask=torch.ones_like(ids))

    monkeypatch.setattr(lenskit.conformance.checks, "conversation_ids", doubled)
    result = one(special_tokens_once(model))
    assert not result.holds and "<|begin_of_text|>" in result.meaning


def test_a_template_without_closing_tokens_does_not_hold_and_says_why():
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = prepare_tokenizer(tiny.tiny_tokenizer(template=template))
    model = load_model(tiny.shared_folder(), device="cpu", check=False, tokenizer=tokenizer)
    results = {result.name: result for result in conformance(model)}
    assert not results["candidate tokens"].holds
    assert "candidate tokens" in results["candidate tokens"].meaning
    assert results["special tokens"].holds


def test_a_length_from_which_on_prompts_change_each_other_is_shown():
    folder = tiny.shared_folder()
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    hf_model = tiny.tiny_hugging_face("llama-gqa", rope_parameters=rope).eval()
    model = load_model(folder, hf_model=hf_model, check=False)
    result = one(long_prompts(model))
    assert not result.holds and not result.needed
    assert result.meaning.startswith("up to 512 tokens") and "dynamic" in result.meaning


def test_candidate_tokens_are_shown():
    assert one(candidate_tokens(pair()[0])).meaning == " ".join(map(repr, tiny.CLOSING))


def test_the_command_shows_every_check_and_says_that_all_is_well(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert check(str(tiny.shared_folder()), device="cpu")
    shown = capsys.readouterr().out
    assert all(name in shown for name in CHECKS)
    assert "LlamaForCausalLM" in shown and "<|eot_id|>" in shown
    assert not re.search(r"\bno\b", shown)


def test_the_command_tells_what_is_not_needed_from_what_fails(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert check(str(tiny.shared_folder("opt")), device="cpu")
    assert "no, not needed" in capsys.readouterr().out
    monkeypatch.setitem(lenskit.conformance.checks.TOLERANCES, torch.float32, 1e-12)
    assert not check(str(tiny.shared_folder()), device="cpu")
    assert "more than 1e-12" in capsys.readouterr().out


def table_of(folder, capsys, monkeypatch, **placing):
    """What the command shows, and its verdict."""
    monkeypatch.setenv("COLUMNS", "300")
    verdict = check(str(folder), **{"device": "cpu", **placing})
    return capsys.readouterr().out, verdict


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("mamba", "Recurrent"), ("t5", "is not a causal language model"), ("biogpt", "cannot open")],
)
def test_the_command_shows_why_a_model_cannot_be_used(
    architecture, reason, tmp_path, capsys, monkeypatch
):
    shown, verdict = table_of(tiny.tiny_folder(tmp_path, architecture), capsys, monkeypatch)
    assert not verdict and reason in shown


TEMPLATES = {
    "no closing tokens": (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "no token after",
    ),
    "refuses": ("{{ raise_exception('not today') }}", "not today"),
    "no template at all": ("{% nonsense", "nonsense"),
    "twice": ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}x", "instead of once"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_command_shows_what_is_wrong_with_a_template(name, tmp_path, capsys, monkeypatch):
    template, reason = TEMPLATES[name]
    folder = tiny.tiny_folder(tmp_path, tokenizer=tiny.tiny_tokenizer(template=template))
    shown, verdict = table_of(folder, capsys, monkeypatch)
    assert not verdict and reason in shown


def test_the_command_shows_that_a_tokenizer_or_a_gpu_is_not_there(tmp_path, capsys, monkeypatch):
    shown, verdict = table_of(tiny.shared_folder(), capsys, monkeypatch, device="cuda:97")
    assert not verdict and "not on this machine" in shown
    folder = tiny.tiny_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    shown, verdict = table_of(folder, capsys, monkeypatch)
    assert not verdict and "tokenizer" in shown


@pytest.mark.parametrize("style", families.REAL_STYLES)
def test_the_command_finds_that_all_is_well_with_a_real_models_tokenizer(
    style, capsys, monkeypatch
):
    shown, verdict = table_of(families.real_style_folder(style), capsys, monkeypatch)
    assert verdict, shown
    assert "candidate tokens" in shown and not re.search(r"\bno\b(?!, not needed)", shown)


def test_whatever_a_check_raises_is_its_result(monkeypatch):
    def fail(model):
        raise AssertionError("an odd model")

    monkeypatch.setattr(lenskit.conformance.checks, "left_padding", fail)
    results = {result.name: result for result in conformance(pair()[0])}
    assert results["fail"].meaning == "AssertionError: an odd model"


def test_meanings_are_not_read_as_markup():
    table = result_table([Result("a", False, None, "[/INST] [bold]")])
    assert table.row_count == 1
    assert list(table.columns[3].cells) == ["\\[/INST] \\[bold]"]
