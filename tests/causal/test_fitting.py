"""Causal vectors are mean differences of activations at the sites that patching names."""

from __future__ import annotations

import pytest
import tiny
import torch

import lenskit as lk

CLEAN = [0, 40, 50, 60, 70, 80]
CORRUPT = [0, 33, 50, 61, 72, 80]
PAIRS = [(CLEAN, CORRUPT), ([0, 91, 92, 93], [0, 81, 82, 83])]


@pytest.fixture
def model():
    return tiny.shared_model()


@torch.no_grad()
def residuals(model, ids):
    found = []
    hooks = [
        (f"blocks.{block}.hook_resid_post", lambda value, hook: found.append(value[0].clone()))
        for block in range(3)
    ]
    with model.hooks(fwd_hooks=hooks):
        model(torch.tensor([ids]))
    return torch.stack(found)


def test_each_blocks_vector_is_the_mean_difference_at_the_positions_that_restore_most(model):
    targets = [[90], [100, 110]]
    vectors = lk.causal.fit_vectors(
        model, PAIRS, "a concept", targets=targets, sites=2, progress=False
    )
    expected = torch.zeros(3, 32)
    for (clean, corrupt), target in zip(PAIRS, targets, strict=True):
        restored = lk.causal.patch(model, corrupt, clean, target=target).restored
        difference = residuals(model, clean) - residuals(model, corrupt)
        for block in range(3):
            for place in restored[block].argsort(descending=True)[:2]:
                if restored[block, place] > 0:
                    expected[block] += difference[block, place]
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(vectors.directions, expected, atol=1e-5, rtol=1e-4)
    assert vectors.labels == "causal" and vectors.concept.prefix == "a concept"
    assert vectors.validation.isnan().all()


def test_they_steer_are_saved_and_read_like_others(model, tmp_path):
    vectors = lk.causal.fit_vectors(model, PAIRS, "a concept", progress=False)
    vectors.save(tmp_path / "causal.safetensors")
    read = lk.ConceptVectors.load(tmp_path / "causal.safetensors", model)
    assert torch.equal(read.directions, vectors.directions) and read.labels == "causal"
    with lk.steer(model, read - 0.5 * vectors, coefficient=1.0):
        lk.generate(model, "What now?", max_new_tokens=2)


def test_of_a_prompt_set_the_candidate_tokens_of_partners_are_patched(model):
    concept = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, concept, number=4, layout="paired")
    vectors = lk.causal.fit_vectors(model, prompts, progress=False)
    capture = lk.capture(model, prompts, progress=False)
    rows = torch.cat([capture.resid_post[row : row + 1] for row in range(4)])
    norms = rows.norm(dim=-1).mean(dim=(0, 2))
    torch.testing.assert_close(vectors.resid_norm, norms, atol=1e-4, rtol=1e-4)
    assert vectors.concept == concept
    # The answer's distribution is that of the last token of the last block, which restores it all.
    has = prompts.has_prefix
    partner = prompts.pair[has]
    expected = (capture.resid_post[has] - capture.resid_post[partner])[:, 2, -1].mean(0)
    cosine = torch.cosine_similarity(vectors.directions[2], expected, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-4)
    alone = lk.build_prompts(model, concept, number=4)
    if not bool((alone.pair >= 0).any()):
        with pytest.raises(ValueError, match="no partners"):
            lk.causal.fit_vectors(model, alone, progress=False)


def test_pairs_that_measure_alike_and_nameless_concepts_are_refused(model):
    with pytest.raises(ValueError, match="measure alike"):
        lk.causal.fit_vectors(model, [(CLEAN, CLEAN)], "none", progress=False)
    with pytest.raises(TypeError, match="concept is needed"):
        lk.causal.fit_vectors(model, PAIRS, progress=False)


def test_a_batch_holds_the_sites_of_all_pairs_and_its_size_changes_nothing(model):
    options = {"targets": [[90], [100]], "progress": False}
    one = lk.causal.fit_vectors(model, PAIRS, "a concept", batch_size=1, **options)
    many = lk.causal.fit_vectors(model, PAIRS, "a concept", batch_size=99, **options)
    torch.testing.assert_close(one.directions, many.directions, atol=1e-5, rtol=1e-4)
