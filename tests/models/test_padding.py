from __future__ import annotations

import pytest
import tiny
import torch

from lenskit.capture import capture
from lenskit.generation import generate
from lenskit.models import ModelCheckError, load_model, model_report, padding
from lenskit.models.reference import probe_tokens, run_plain
from lenskit.prompts import build_prompts


def longrope(length):
    rope = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=[1.0] * 4,
        long_factor=[4.0, 8.0, 16.0, 32.0],
        original_max_position_embeddings=length,
    )
    return "phi3", dict(original_max_position_embeddings=length, rope_parameters=rope)


def dynamic(length):
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    return "llama-gqa", dict(max_position_embeddings=length, rope_parameters=rope)


def sparse(length):
    return "glm_moe_dsa", dict(index_topk=length)


SWITCHES = {"longrope": longrope, "dynamic": dynamic, "index_topk": sparse}
PROBES = (16, 34)


def loaded(kind, length, **options):
    architecture, settings = SWITCHES[kind](length)
    hf_model = tiny.tiny_hugging_face(architecture, **settings).eval()
    return load_model(hf_model=hf_model, tokenizer=tiny.tiny_tokenizer(), **options)


def test_the_probes_are_as_long_as_these_tests_say():
    assert tuple(probe_tokens(tiny.shared_model().tokenizer).lengths.tolist()) == PROBES


@pytest.mark.parametrize(("kind", "length"), [("longrope", 20), ("dynamic", 20), ("index_topk", 8)])
def test_a_model_whose_short_prompts_depend_on_the_batch_is_refused(kind, length):
    architecture, settings = SWITCHES[kind](length)
    hf_model = tiny.tiny_hugging_face(architecture, **settings).eval()
    tokens = probe_tokens(tiny.shared_model().tokenizer)
    alone = run_plain(hf_model, tokens.rows([0]).trimmed()).logits[0, -1]
    together = run_plain(hf_model, tokens).logits[0, -1]
    assert (alone - together).abs().max() > 0.05 * alone.abs().max()
    with pytest.raises(ModelCheckError, match=f"depends on the prompts beside it.*{kind}, from"):
        loaded(kind, length)


@pytest.mark.parametrize("check", [True, "hooks", False])
@pytest.mark.parametrize("kind", SWITCHES)
def test_a_model_that_switches_later_is_run_up_to_there(kind, check):
    model = loaded(kind, 40, check=check)
    assert model_report(model).longest == 40
    ids = torch.arange(41)[None]
    with torch.no_grad():
        model(ids[:, :40])
        with pytest.raises(ValueError, match=f"41 tokens are too many: beyond 40 .*{kind}"):
            model(ids)


def test_long_prompts_and_answers_of_such_a_model_are_refused_and_short_ones_are_not():
    model = loaded("longrope", 60, check=False)
    short, long = ["Rain.", "Sun."], ["Rain.", "Sun, " * 40]
    prompts = build_prompts(model, "Be kind.", statements=short)
    assert capture(model, prompts, progress=False).resid_post.isfinite().all()
    with pytest.raises(ValueError, match="too many: beyond 60"):
        capture(
            model, build_prompts(model, "Be kind.", statements=long), progress=False, batch_size=1
        )
    generate(model, "Why?", max_new_tokens=8)
    with pytest.raises(ValueError, match="61 tokens are too many"):
        generate(model, "Why?", max_new_tokens=400)


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_limit_that_is_too_long_to_be_tried_is_a_limit(kind):
    assert model_report(loaded(kind, 5000)).longest == 5000


def test_a_window_that_is_too_long_to_be_tried_is_believed_and_named():
    hf_model = tiny.tiny_hugging_face("mistral-window", sliding_window=4096).eval()
    report = model_report(load_model(hf_model=hf_model, tokenizer=tiny.tiny_tokenizer()))
    assert report.longest is None and report.untried == ("sliding_window of 4096",)


@pytest.mark.parametrize("architecture", ["mistral-window", "gpt_neo", "gemma3", "llama4"])
def test_windows_are_tried_by_prompts_that_are_longer(architecture, monkeypatch):
    tried = []
    real = padding._differs_beyond

    def spy(hf_model, ids, limit, pad):
        tried.append(limit)
        return real(hf_model, ids, limit, pad)

    monkeypatch.setattr(padding, "_differs_beyond", spy)
    settings = {"attention_chunk_size": 40} if architecture == "llama4" else {}
    hf_model = tiny.tiny_hugging_face(architecture, **settings).eval()
    report = model_report(load_model(hf_model=hf_model, tokenizer=tiny.tiny_tokenizer()))
    assert tried == [40] and report.longest is None and report.untried == ()


def test_a_window_that_counts_padding_is_a_limit(monkeypatch):
    """A module that looks at the length of the batch, beyond a window that the config names."""
    hf_model = tiny.tiny_hugging_face("mistral-window").eval()

    def look(module, arguments, output):
        return output * (2 if output.shape[1] > 40 else 1)

    hf_model.model.layers[1].mlp.register_forward_hook(look)
    model = load_model(hf_model=hf_model, tokenizer=tiny.tiny_tokenizer())
    assert model_report(model).longest == 40
    with pytest.raises(ValueError, match=r"beyond 40 \(sliding_window\)"):
        model(torch.arange(41)[None])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_another_batch_is_no_dependence(dtype):
    for architecture in ("llama-gqa", "gemma3", "qwen3_moe"):
        load_model(tiny.shared_folder(architecture), device="cpu", dtype=dtype)
