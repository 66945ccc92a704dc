from __future__ import annotations

import pytest
import tiny
import torch
from experimented import CONCEPTS, OPTIONS, answers_of, run

from lenskit.capture import capture
from lenskit.enrichment import enrich
from lenskit.generation import generate
from lenskit.prompts import build_prompts
from lenskit.recipes import DEFAULT
from lenskit.selector import select_tokens
from lenskit.steering import steer
from lenskit.study.experiments import blocks
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.block_scores import (
    BLOCK_SCORES,
    Drawn,
    Stretch,
    Top,
    agreement,
    logit_lens,
)
from lenskit.vectors import LEARNERS, fit_vectors

STATEMENTS = OPTIONS["statements"]


@pytest.fixture(scope="module")
def bench():
    return Bench(tiny.shared_model(), CONCEPTS[0], 24, 0, LEARNERS, DEFAULT, STATEMENTS)


def test_the_top_blocks_are_those_of_the_enrichment_and_the_bottom_ones_are_others(bench):
    model, concept = bench.model, bench.concept
    prompts = build_prompts(model, concept, number=24, layout="paired", statements=STATEMENTS)
    split = build_prompts(model, concept, number=24, statements=STATEMENTS)
    tokens = select_tokens(capture(model, split, progress=False))
    for null in ("keys", "paired"):
        name = "enrichment" if null == "keys" else f"enrichment, {null}"
        expected = enrich(model, prompts, tokens, null=null, progress=False)
        torch.testing.assert_close(BLOCK_SCORES[name](bench), expected.scores)
        assert Top(BLOCK_SCORES[name], 2)(bench) == expected.top(2)
        assert Top(BLOCK_SCORES[name], 1, lowest=True)(bench) == expected.bottom(1)


def test_agreement_is_the_mean_cosine_among_paired_differences(bench):
    rows = bench.selection("attention").take(bench.paired.resid_post)
    differences = rows[0::2] - rows[1::2]
    number = len(differences)
    for layer in range(3):
        own = torch.nn.functional.cosine_similarity(
            differences[:, None, layer], differences[None, :, layer], dim=-1
        )
        mean = (own.sum() - own.diagonal().sum()) / (number * (number - 1))
        assert float(agreement(bench)[layer]) == pytest.approx(float(mean), abs=1e-5)


def test_the_logit_lens_of_the_last_block_is_the_model_itself(bench):
    found, prompts = logit_lens(bench), bench.capture.prompts
    tokens = prompts.tokens.rows(prompts.has_prefix.nonzero()[:, 0])
    reference = tiny.reference_model(tiny.shared_folder())
    with torch.no_grad():
        output = reference(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=(tokens.attention_mask.cumsum(-1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
        own = output.logits[:, -1].argmax(-1)
        first = reference.lm_head(reference.model.norm(output.hidden_states[1][:, -1])).argmax(-1)
    assert float(found[-1]) == 1.0
    assert float(found[0]) == pytest.approx(float((first == own).float().mean()))


def test_stretches_lie_side_by_side_and_draws_are_a_concepts_own(bench):
    chosen = [Stretch(where, 2)(bench) for where in ("early", "middle", "late")]
    assert chosen == [(0, 1), (0, 1), (1, 2)]
    assert Drawn(2)(bench) == Drawn(2)(bench) and len(Drawn(2)(bench)) == 2


def test_blocks_get_the_same_total_however_many_they_are(bench):
    found = run(blocks, CONCEPTS[:1])
    model, concept = bench.model, bench.concept
    prompts = build_prompts(model, concept, number=24, statements=STATEMENTS)
    vectors = fit_vectors(capture(model, prompts, progress=False), progress=False)
    for way, chosen in (("late 2", [1, 2]), ("block 1", [1]), ("all blocks", [0, 1, 2])):
        own = answers_of(found, way)
        with steer(model, vectors, coefficient=2.0 / len(chosen), blocks=chosen):
            assert list(own.answer) == generate(model, list(own.question), max_new_tokens=5)
    assert {"top 1 by enrichment", "top 2 by logit lens", "bottom 2 by enrichment"} <= set(
        found.table.way
    )
    ranking = found.parts["ranking"]
    assert "enrichment" in set(ranking.way)
    assert set(found.parts["block scores"].block) == {0, 1, 2}
