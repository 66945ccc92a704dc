"""Models with tokenizers and templates like real ones, from their folder to a steered answer."""

from __future__ import annotations

import families
import pytest
import torch

import lenskit as lk


@pytest.mark.parametrize("style", families.REAL_STYLES)
def test_a_real_style_of_model_goes_through_the_quickstart(style):
    model = lk.load_model(families.real_style_folder(style), device="cpu")
    concept = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, concept, number=24)
    marked = prompts.tokens.input_ids[0][prompts.prefix_mask[0]]
    assert model.tokenizer.decode(marked).strip() == concept.prefix
    assert torch.equal(prompts.prefix_mask.any(dim=1), prompts.has_prefix)

    capture = lk.capture(model, prompts, progress=False)
    assert bool((capture.attention_to_prefix[~prompts.has_prefix] == 0).all())
    assert bool((capture.attention_to_prefix[prompts.has_prefix] > 0).all())
    tokens = lk.select_tokens(capture)
    labels = lk.soft_labels(capture, tokens)
    vectors = lk.fit_vectors(capture, tokens, labels, learner=lk.SoftCovariance())
    question = concept.questions[0]
    plain = lk.generate(model, question, max_new_tokens=6)
    with lk.steer(model, vectors, coefficient=0.7, relative=True):
        steered = lk.generate(model, question, max_new_tokens=6)
    assert steered.token_ids != plain.token_ids
    assert lk.generate(model, question, max_new_tokens=6).token_ids == plain.token_ids
    assert len(lk.enrich(model, prompts, tokens, progress=False).top(2)) == 2
