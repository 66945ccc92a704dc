"""The direct contribution of a head, by loops over keys with the weights of another copy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch

import lenskit as lk
from lenskit.models import ModelCheckError
from lenskit.profiling import agreement, contributions
from lenskit.tasks import Task, TaskPrompt

INSTRUCTION = "Answer in one word."
PROMPTS = [
    TaskPrompt(({"role": "user", "content": text},), INSTRUCTION, target)
    for text, target in (
        (f"{INSTRUCTION} What is the scariest thing in the world?", "Rain"),
        (f"Rain? {INSTRUCTION}", "Sun"),
    )
]


def judge(prompt, answer):
    return lk.Verdict(1, "")


@cache
def reference(architecture):
    return tiny.reference_model(tiny.shared_folder(architecture))


def weights(architecture, block):
    """W_O by head, W_U, the gains of the final norm and of the one behind attention."""
    copy = reference(architecture)
    if architecture == "gpt2":
        own = copy.transformer
        out = own.h[block].attn.c_proj.weight
        return out.unflatten(0, (4, 8)), copy.lm_head.weight, own.ln_f.weight, None
    layer = copy.model.layers[block]
    out = layer.self_attn.o_proj.weight.T.unflatten(0, (4, 8))
    one = 1.0 if architecture == "gemma2" else 0.0
    behind = layer.post_attention_layernorm.weight + one if one else None
    return out, copy.lm_head.weight, copy.model.norm.weight + one, behind


@torch.no_grad()
def by_loops(model, architecture, prompt):
    """[block, head], one prompt without padding, one key after the other."""
    tokens = lk.chat_ids(model, [prompt.messages])
    names = ["attn.hook_pattern", "attn.hook_v", "attn.hook_out", "hook_resid_post"]
    seen = {}

    def read(block, name):
        def keep(value, hook):
            seen[block, name] = value.clone()

        return keep

    hooks = [(f"blocks.{b}.{name}", read(b, name)) for b in range(3) for name in names]
    with model.hooks(fwd_hooks=hooks):
        model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    span = lk.tasks.emphasised_span(model, prompt).positions
    token = model.tokenizer(prompt.target, add_special_tokens=False)["input_ids"][0]
    found = torch.zeros(3, 4)
    for block in range(3):
        out, unembed, gain, behind = weights(architecture, block)
        direction = gain * (unembed[token] - unembed.mean(dim=0))
        last = seen[2, "hook_resid_post"][0, -1]
        if architecture == "gpt2":
            direction = (direction - direction.mean()) / (last.var(unbiased=False) + 1e-5).sqrt()
        else:
            direction = direction / (last.square().mean() + 1e-6).sqrt()
        if behind is not None:
            wrote = seen[block, "attn.hook_out"][0, -1]
            direction = behind * direction / (wrote.square().mean() + 1e-6).sqrt()
        for head in range(4):
            for key in range(tokens.input_ids.shape[1]):
                value = seen[block, "attn.hook_v"][0, key]
                own = value[head * value.shape[0] // 4] @ out[head]
                worth = seen[block, "attn.hook_pattern"][0, head, -1, key] * (own @ direction)
                found[block, head] += worth if key in span else -worth
    return found


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "gemma2"])
def test_a_contribution_is_the_sum_over_keys_by_loops(architecture):
    model = tiny.shared_model(architecture)
    found = contributions(model, PROMPTS)
    exact = torch.stack([by_loops(model, architecture, prompt) for prompt in PROMPTS])
    assert torch.allclose(found, exact, atol=1e-4 * float(exact.abs().max()))
    assert torch.equal(contributions(model, PROMPTS, batch_size=1).sign(), exact.sign())


def test_as_a_stage_it_costs_one_pass_a_prompt_and_ranks_heads():
    model = tiny.shared_model()
    prompts = [replace(prompt, metadata={"case": 1}) for prompt in PROMPTS]
    task = Task("one", (*PROMPTS, *prompts), judge, 3)
    scores = lk.profile_heads(model, task, stage="contribution", progress=False)
    found = contributions(model, task.prompts).double()
    assert torch.equal(scores.samples[0, :2], found[:2])
    assert torch.allclose(scores.samples[0, 2], found[2:].mean(dim=0))
    assert scores.passes == 4 and scores.baselines.tolist() == [0.0]
    some = lk.profile_heads(
        model, task, stage="contribution", heads=lk.Heads({1: [0, 2]}), progress=False
    )
    assert len(some.heads) == 2 and torch.equal(some.scores[0, 1, 2], scores.scores[0, 1, 2])
    full = lk.profile_heads(model, task, progress=False)
    table = agreement(full, scores, k=3)
    assert table["passes"][0] > 100 and table["other_passes"][0] == 4
    assert scores.figure().alt.startswith("direct contribution, logits")


@pytest.mark.parametrize("architecture", ["gpt_neox", "olmo2", "bloom", "gpt_oss"])
def test_it_is_read_from_other_architectures(architecture):
    found = contributions(tiny.shared_model(architecture), PROMPTS)
    assert found.isfinite().all() and (found != 0).all()


def test_models_whose_parts_do_not_add_up_are_refused():
    with pytest.raises(ModelCheckError, match="cannot be read"):
        contributions(tiny.shared_model("deepseek_v2"), PROMPTS)
    with pytest.raises(ValueError, match="no target"):
        contributions(tiny.shared_model(), [replace(PROMPTS[0], target="")])
