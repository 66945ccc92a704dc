from __future__ import annotations

import pytest
import tiny
import torch
from experimented import CONCEPTS, OPTIONS, answers_of, run

from lenskit.capture import capture
from lenskit.concepts import concepts
from lenskit.generation import generate
from lenskit.labels import displacement_cosine, gating_labels, soft_labels
from lenskit.prompts import build_prompts
from lenskit.selector import select_tokens
from lenskit.steering import steer
from lenskit.study.experiments import labels
from lenskit.study.experiments.setting import given
from lenskit.vectors import fit_vectors


@pytest.fixture(scope="module")
def found():
    return run(labels, numbers=(8, 24), learners=("covariance", "ridge"))


@pytest.mark.filterwarnings("ignore:the attention that varies most")
def test_each_way_is_learnt_from_its_own_labels_and_number_of_prompts(found):
    model, concept = tiny.shared_model(), CONCEPTS[0]
    for kind, number in (("soft", 24), ("soft", 8), ("gating", 24)):
        prompts = build_prompts(model, concept, number=number, statements=OPTIONS["statements"])
        captured = capture(model, prompts, progress=False)
        tokens = select_tokens(captured)
        make = {"soft": soft_labels, "gating": gating_labels}[kind]
        vectors = fit_vectors(
            captured, tokens, make(captured, tokens), learner="ridge", progress=False
        )
        way = f"{kind}, ridge, {number} prompts"
        own = answers_of(found, way)
        with steer(model, vectors, coefficient=2.0 / 3):
            assert list(own.answer) == generate(model, list(own.question), max_new_tokens=5)


def test_what_cannot_be_learnt_says_so_and_the_truth_is_asked_only_where_it_is_known(found):
    assert not [way for way in set(found.table.way) if "true activity" in way]
    failed = found.answers[found.answers.question == ""]
    for row in failed.itertuples():
        assert row.reason and row.score != row.score
    said = " ".join(found.notes)
    assert all(f"«{way}» could not be made" in said for way in set(failed.way))


def test_labels_are_compared_with_hard_ones_of_the_same_learner_and_prompts(found):
    own = found.table.set_index(["concept_class", "way", "measure"])
    row = own.loc[("all", "soft, ridge, 8 prompts", "held out")]
    assert row["reference"] == "hard, ridge, 8 prompts"
    hard = own.loc[("all", "hard, ridge, 8 prompts", "held out")]
    assert row["difference"] == pytest.approx(row["mean"] - hard["mean"])
    assert hard["difference"] == 0


def test_the_displacement_of_inactive_prompts_stands_beside_what_labels_gain(found):
    part = found.parts["displacement"]
    assert set(part.measure) == {"cosine", "p value"}
    assert {"gating label, block 0", "gating label, block 2"} <= set(part.way)
    assert {"gain", "displacement cosine", "labels", "learner"} <= set(found.parts["gain"])


def test_the_displacement_cosine_is_that_of_the_means():
    model = tiny.shared_model()
    prompts = build_prompts(model, concepts["fears"]["spiders"], number=24)
    captured = capture(model, prompts, progress=False)
    rate = torch.tensor([1.0, 0.0, 0.0, 0.0] * 6)
    tokens = select_tokens(captured)
    found = displacement_cosine(captured, rate)
    for layer, place in enumerate(tokens.index.tolist()):
        rows = captured.resid_post[:, layer, place]
        bare = rows[1::2].mean(0)
        active, inactive = rows[0::4].mean(0) - bare, rows[2::4].mean(0) - bare
        expected = active @ inactive / (active.norm() * inactive.norm())
        assert float(found[layer]) == pytest.approx(float(expected), abs=1e-5)
    assert displacement_cosine(captured, torch.ones(24)).isnan().all()
    with pytest.raises(ValueError, match="one number for each of the 24 prompts"):
        displacement_cosine(captured, torch.ones(3))


def test_a_number_of_prompts_that_was_not_given_leaves_the_experiments_own():
    # The command line says None for whatever is left out.
    assert given({"prompts": None, "seed": 3}, prompts=400) == {"prompts": 400, "seed": 3}
    assert given({"prompts": 24}, prompts=400) == {"prompts": 24}
