from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from experimented import CONCEPTS, OPTIONS, run

from lenskit.capture import capture
from lenskit.generation import generate
from lenskit.prompts import build_prompts
from lenskit.recipes import recipes
from lenskit.scoring import fluency
from lenskit.steering import steer
from lenskit.study import look
from lenskit.study.experiments import recipe
from lenskit.study.experiments.recipe import halves
from lenskit.vectors import fit_vectors

FOUR = (
    *CONCEPTS,
    *(replace(one, name=f"{one.name} too", prefix=f"{one.prefix} Yes.") for one in CONCEPTS),
)
BUDGET = (0.5, 1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def found():
    return run(recipe, FOUR, coefficients=BUDGET)


def captured(model, concept):
    prompts = build_prompts(model, concept, number=24, statements=OPTIONS["statements"])
    return capture(model, prompts, progress=False)


def test_every_other_concept_of_a_class_is_searched_and_the_rest_reported(found):
    search, report = halves(FOUR)
    assert [one.name for one in search] == ["cheerful", "spiders too"]
    assert set(found.answers["concept"]) == {one.name for one in report}
    assert not {one.name for one in search} & {one.name for one in report}
    assert sorted(one.name for half in halves(FOUR[:3]) for one in half) == sorted(
        one.name for one in FOUR[:3]
    )


def test_the_recipe_is_what_a_look_at_the_searched_half_settles(found):
    model = tiny.shared_model()
    search, report = halves(FOUR)
    looked = look(model, [captured(model, one) for one in search])
    assert found.parts["look"]["divergence"].tolist() == pytest.approx(
        looked.table["divergence"].tolist(), rel=1e-3
    )
    chosen = looked.recipe
    own = found.answers[(found.answers.way == "lenskit") & ~found.answers.calibrated]
    assert set(own["token"]) == {chosen.token} and set(own["blocks"]) == {chosen.blocks}
    for concept in report:
        made = captured(model, concept)
        vectors = fit_vectors(made, recipe=chosen, model=model, progress=False)
        with steer(model, vectors, recipe=chosen):
            expected = generate(model, list(concept.questions), max_new_tokens=5)
        rows = own[(own.concept == concept.name) & (own.coefficient == chosen.coefficient)]
        assert list(rows.answer) == expected
        fixed = found.parts["by concept"].query("way == 'lenskit' and concept == @concept.name")
        assert fixed["fixed coefficient"].iloc[0] == pytest.approx(rows.score.mean())
        asked = [f"{concept.prefix} {question}" for question in concept.questions]
        prompted = generate(model, asked, max_new_tokens=5)
        told = [
            fluency(model, concept.questions, said, prefixes=[concept.prefix] * 3).nanmean()
            for said in (expected, prompted)
        ]
        assert fixed["less fluent"].iloc[0] == pytest.approx(float(told[0] - told[1]), abs=1e-3)


def test_the_other_recipes_and_one_part_removed_at_a_time_stand_beside_it(found):
    ways = set(found.table["way"])
    assert {"lenskit", "paper", "default", "unsteered", "prefix in the prompt"} <= ways
    assert {"lenskit, hard labels", "lenskit, equal lengths", "lenskit, 16 prompts"} <= ways
    assert {f"lenskit, {how}" for how in ("norms kept", "neutral prefix as negative")} <= ways
    scored = found.answers[found.answers.way.str.startswith("lenskit") & ~found.answers.calibrated]
    assert scored["score"].notna().all()
    assert found.reference == "lenskit" and "fixed coefficient" in found.measures
    assert "Searched on 2 other concepts. Looked: " in found.notes[-1]
    paper = found.answers[found.answers.way == "paper"].iloc[0]
    assert (paper["token"], paper["labels"], paper["blocks"]) == ("attention", "soft", "from1")


def test_a_single_concept_cannot_be_searched_and_reported():
    with pytest.raises(ValueError, match="give two concepts or more"):
        run(recipe, CONCEPTS[0])


def test_displacements_are_not_shared_by_blocks():
    from lenskit.study.experiments.ways import sharing

    model = tiny.shared_model()
    made = captured(model, CONCEPTS[0])
    everywhere = replace(recipes["lenskit"], token="each", blocks="all", labels="hard")
    vectors = fit_vectors(made, recipe=everywhere, progress=False)
    assert sharing(vectors) == 1 and sharing(replace(vectors, displacement=None)) == 3
