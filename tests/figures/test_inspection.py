from __future__ import annotations

import pytest
import torch
from tiny import shared_model

from lenskit.concepts import Concept
from lenskit.figures import pattern_rows, token_texts
from lenskit.figures.views import attention_view
from lenskit.prompts import build_prompts


@pytest.fixture(scope="module")
def prompts():
    return build_prompts(shared_model(), Concept("Take on a cheerful mood."), number=4)


def test_the_rows_of_all_blocks_are_those_of_each(prompts):
    model = shared_model()
    every = pattern_rows(model, prompts, 1)
    assert every.shape[:3] == (3, 4, len(prompts.candidates))
    assert torch.equal(every[[0, 2]], pattern_rows(model, prompts, 1, blocks=[2, 0]))
    assert torch.allclose(every[1], pattern_rows(model, prompts, 1, block=1), atol=1e-6)
    assert torch.allclose(every.sum(-1), torch.ones(()), atol=1e-5)
    with pytest.raises(ValueError, match="block=1 and blocks"):
        pattern_rows(model, prompts, block=1, blocks=[1])


def test_a_view_of_a_models_own_prompt_has_a_token_for_each_key(prompts):
    texts = token_texts(shared_model(), prompts, 1)
    assert attention_view(texts, pattern_rows(shared_model(), prompts, 1)).picture
