"""Attribution is the derivative of patching, and says how far it is from the real thing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from scipy.stats import spearmanr

import lenskit as lk
from lenskit.causal.runs import HOOKS

CLEAN = [0, 40, 50, 60, 70, 80]
CORRUPT = [0, 33, 50, 61, 72, 80]


@pytest.fixture
def model():
    return tiny.shared_model()


@torch.no_grad()
def kept(model, ids, at):
    found = []
    names = [f"blocks.{block}.{HOOKS[at]}" for block in range(3)]
    hooks = [(name, lambda value, hook: found.append(value[0].clone())) for name in names]
    with model.hooks(fwd_hooks=hooks):
        model(torch.tensor([ids]))
    return found


@pytest.mark.parametrize("at", HOOKS)
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt_neox", "gemma3"])
def test_attribution_is_the_slope_of_patching_a_little_of_the_way(architecture, at):
    model = tiny.shared_model(architecture)
    options = {"target": [90, 100], "at": at}
    found = lk.causal.attribute(model, CORRUPT, CLEAN, **options)
    clean, step = kept(model, CLEAN, at), 0.01

    def towards(share):
        def source(block, values):
            return values + share * (clean[block] - values)

        return lk.causal.patch(model, CORRUPT, source, **options).effects

    slope = (towards(step) - towards(-step)) / (2 * step)
    torch.testing.assert_close(found.effects, slope, atol=5e-3, rtol=2e-2)
    assert slope.abs().max() > 0.1 and found.method == "attribution"


def test_with_many_steps_the_embeddings_attributions_add_up_to_the_whole_difference(model):
    options = {"target": [90], "against": [100], "at": "resid_pre", "blocks": [0]}
    found = lk.causal.attribute(model, CORRUPT, CLEAN, steps=200, **options)
    whole = found.source - found.plain
    assert float(found.effects.sum()) == pytest.approx(whole, rel=0.02)
    one = lk.causal.attribute(model, CORRUPT, CLEAN, **options)
    assert abs(float(one.effects.sum()) - whole) > 0.1 * abs(whole)


def test_spans_add_up_and_heads_are_summed_over_their_positions(model):
    each = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="mlp_out")
    span = lk.causal.attribute(
        model, CORRUPT, CLEAN, target=[90], at="mlp_out", blocks=[1], positions=[[1, 3], 4]
    )
    expected = torch.stack([each.effects[1, 1] + each.effects[1, 3], each.effects[1, 4]])
    torch.testing.assert_close(span.effects[0], expected)
    heads = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="z")
    last = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="z", positions=[-1])
    rest = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="z", positions=range(5))
    assert heads.axes == ("block", "head") and heads.values.shape == (3, 4)
    torch.testing.assert_close(heads.effects, last.effects + rest.effects, atol=1e-5, rtol=1e-4)


def test_no_gradient_is_kept_in_the_weights_and_patching_is_as_before(model):
    before = lk.causal.patch(model, CORRUPT, CLEAN, target=[90]).values
    model.original_model.zero_grad(set_to_none=True)
    lk.causal.attribute(model, CORRUPT, CLEAN, target=[90])
    assert all(weight.grad is None for weight in model.original_model.parameters())
    assert torch.equal(lk.causal.patch(model, CORRUPT, CLEAN, target=[90]).values, before)


def test_sources_other_than_prompts_are_attributed_without_steps_between(model):
    noise = lk.causal.Noise(0.01, seed=1)
    options = {"target": [90], "at": "attn_out"}
    exact = lk.causal.patch(model, CORRUPT, noise, **options)
    fast = lk.causal.attribute(model, CORRUPT, noise, **options)
    torch.testing.assert_close(fast.effects, exact.effects, atol=2e-3, rtol=5e-2)
    with pytest.raises(ValueError, match="source prompt of the same length"):
        lk.causal.attribute(model, CORRUPT, noise, steps=2, **options)
    with pytest.raises(ValueError, match="single blocks"):
        lk.causal.attribute(model, CORRUPT, CLEAN, blocks=[[0, 1]], **options)


def test_the_gradient_is_taken_at_the_noised_prompt(model):
    noised = lk.causal.Noised(CLEAN, scale=0.5)
    fast = lk.causal.attribute(model, noised, CLEAN, target=[90], at="mlp_out")
    exact = lk.causal.patch(model, noised, CLEAN, target=[90], at="mlp_out")
    assert fast.plain == pytest.approx(exact.plain, abs=1e-5)
    # The last position of the last block is passed on by the final norm alone.
    slope = lk.causal.attribute(
        model, noised, CLEAN, target=[90], at="resid_pre", blocks=[0], steps=200
    )
    assert float(slope.effects.sum()) == pytest.approx(exact.source - exact.plain, rel=0.02)


def test_agreement_is_rank_correlation_and_overlap_of_the_greatest_effects(model):
    exact = lk.causal.patch(model, CORRUPT, CLEAN, target=[90], at="attn_out")
    fast = lk.causal.attribute(model, CORRUPT, CLEAN, target=[90], at="attn_out")
    found = lk.causal.agreement(exact, fast, top=4)
    expected = spearmanr(exact.effects.flatten(), fast.effects.flatten()).statistic
    assert found.spearman == pytest.approx(expected, abs=1e-9)
    shared = {*exact.top(4)} & {*fast.top(4)}
    assert found.overlap == len(shared) / 4 and found.chance == 4 / 18
    itself = lk.causal.agreement(exact, exact, top=18)
    assert (itself.spearman, itself.overlap, itself.chance) == (pytest.approx(1), 1, 1)
    assert "spearman" in repr(found)


def test_results_of_other_sites_are_not_compared_and_constant_ones_have_no_correlation(model):
    exact = lk.causal.patch(model, CORRUPT, CLEAN, target=[90])
    for change in ({"at": "z"}, {"measure": "other"}, {"places": ((0,),) * 6}):
        with pytest.raises(ValueError, match="different " + next(iter(change))):
            lk.causal.agreement(exact, replace(exact, **change))
    flat = replace(exact, values=torch.full((3, 6), exact.plain))
    assert math.isnan(lk.causal.agreement(exact, flat).spearman)
