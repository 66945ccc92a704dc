"""Defaults are in one place, and the paper's settings are one name."""

from __future__ import annotations

import inspect
import pickle

import pytest
import tiny
import torch
from steered import random_vectors

import lenskit as lk
from lenskit.recipes import DEFAULT, find_recipe
from lenskit.steering import intervention
from lenskit.study import study_concept
from lenskit.study.ways import settings_of

SPIDERS = lk.concepts["fears"]["spiders"]


def judge(concept, question, answer):
    return len(answer) % 2


def test_steering_studies_and_variants_take_their_defaults_from_one_recipe():
    for function in (lk.steer, lk.generate_steered):
        taken = inspect.signature(function).parameters
        assert taken["relative"].default is None  # a tensor knows no residual norm
        assert taken["start"].default is None is taken["recipe"].default
    model = tiny.shared_model()
    vectors = random_vectors(model)
    taken, said = (intervention(model, vectors, 1.0, relative=r) for r in (None, DEFAULT.relative))
    assert torch.equal(taken.directions, said.directions) and taken.start == DEFAULT.start
    own = (DEFAULT.token, DEFAULT.labels, DEFAULT.learner, DEFAULT.blocks)
    assert tuple(vars(lk.variants()[0]).values())[:4] == own
    ways, settings = settings_of(None, {})
    assert ways == lk.variants()
    assert settings["coefficients"] == DEFAULT.coefficients
    assert settings["relative"] is DEFAULT.relative


def test_the_papers_recipe_is_that_of_the_paper():
    paper = lk.recipes["paper"]
    assert (paper.token, paper.labels, paper.learner) == ("attention", "soft", "rfm")
    assert (paper.blocks, paper.start, paper.relative) == ("from1", 0, False)
    assert paper.scale_validation and paper.separator and paper.unit_rows == "rfm"
    first = lk.variants(recipe="paper")[0]
    assert first == lk.Variant("attention", "soft", "rfm", "from1")
    assert lk.variants(recipe="paper", learners="ridge")[0].learner == "ridge"


def test_a_recipe_prints_itself_and_can_be_sent_to_another_process():
    shown = str(lk.recipes["paper"])
    for word in ("paper", "arXiv 2602.00333", "from1", "soft", "rfm", "depend on the model"):
        assert word in shown
    assert pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT
    assert find_recipe(None) is DEFAULT is find_recipe(DEFAULT) is find_recipe("default")
    with pytest.raises(KeyError, match="'papre' is not one of .*did you mean 'paper'"):
        lk.variants(recipe="papre")


def test_absolute_coefficients_of_the_paper_have_to_be_given():
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="coefficients of recipe 'paper' are absolute"):
        study_concept(model, SPIDERS, recipe="paper", judge=judge)


def test_a_study_with_the_papers_recipe_is_its_steps_one_by_one():
    model = tiny.shared_model()
    options = dict(coefficients=2, prompts=24, judge=judge, max_new_tokens=6)
    ways = lk.variants(recipe="paper", controls=())
    found = lk.run_study(model, SPIDERS, ways, recipe="paper", progress=False, **options).answers

    from lenskit.prompts import with_separator

    prompts = with_separator(model, lk.build_prompts(model, SPIDERS, number=24))
    capture = lk.capture(model, prompts, progress=False)
    vectors = lk.fit_vectors(capture, recipe="paper", progress=False)
    with lk.steer(model, vectors, coefficient=2, relative=False, blocks=range(1, 3)):
        expected = lk.generate(model, SPIDERS.questions, max_new_tokens=6)
    assert list(found.answer) == expected
    assert list(found.blocks.unique()) == ["from1"]


def test_the_separating_space_counts_as_prefix_where_asked_for():
    model = lk.load_model()
    bare = lk.build_prompts(model, SPIDERS, number=8)
    from lenskit.prompts import with_separator

    wide = with_separator(model, bare)
    for ids, before, after, prefixed in zip(
        bare.tokens.input_ids, bare.prefix_mask, wide.prefix_mask, bare.has_prefix, strict=True
    ):
        added = after & ~before
        assert bool((before <= after).all()) and int(added.sum()) == int(prefixed)
        assert model.tokenizer.decode(ids[after]).rstrip() == model.tokenizer.decode(ids[before])
        if prefixed:
            place = int(added.nonzero())
            assert model.tokenizer.decode(ids[place]).isspace()
            assert model.tokenizer.decode(ids[place + 1 :]).startswith(" What are your thoughts")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"controls": ["unsteerd"]}, "'unsteerd' is not one of .*did you mean 'unsteered'"),
        ({"controls": ""}, "control '' is not one of"),
        ({"labels": "sfot"}, "did you mean 'soft'"),
        ({"tokens": -1.5}, "token must be"),
        ({"tokens": [0]}, "token must be"),
        ({"blocks": "top"}, "blocks must be"),
        ({"blocks": [1.5]}, "blocks must be"),
        ({"blocks": "2,2"}, "blocks must be"),
        ({"blocks": 4}, "blocks must be"),
        ({"learners": []}, "at least one choice"),
    ],
)
def test_a_choice_that_is_none_is_refused_with_what_would_work(choice, said):
    with pytest.raises((ValueError, TypeError), match=said):
        lk.variants(**choice)


def test_one_choice_stands_for_a_list_of_one():
    found = lk.variants(tokens=-1, labels="soft", learners="rfm", blocks="12", controls="prompted")
    assert found == (
        lk.Variant("-1", "soft", "rfm", "12"),
        lk.Variant("-1", "soft", "rfm", "12", "prompted"),
    )
    assert lk.variants(blocks=[(4, 5), "all"], controls=())[0].blocks == "4,5"


@pytest.mark.parametrize(
    ("variants", "options", "said"),
    [
        ((), {}, "variants is empty"),
        (iter([lk.Variant()]), {}, "variants is list_iterator, read once"),
        ((way for way in [lk.Variant()]), {}, "variants is generator"),
        (None, {"coefficients": ()}, "coefficients is empty"),
        (None, {"coefficients": (c for c in (1.0, 2.0))}, "coefficients is generator"),
        (None, {"coefficients": (1.0, float("nan"))}, "finite and different"),
        (None, {"coefficients": (1.0, 1)}, "finite and different"),
        ([lk.Variant(learner="rigde")], {}, "did you mean 'ridge'"),
    ],
)
def test_a_study_refuses_what_it_could_not_run_before_it_runs(variants, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        lk.run_study(tiny.shared_model(), SPIDERS, variants, out=tmp_path, judge=judge, **options)
    assert not list(tmp_path.iterdir())


def test_a_judge_may_return_a_bool_a_number_or_a_verdict():
    model = tiny.shared_model()
    options = dict(coefficients=1.0, prompts=24, max_new_tokens=4)
    for given, score in ((True, 1), (0.25, 0.25), (lk.Verdict(1, "on concept"), 1), (0, 0)):
        rows = study_concept(model, SPIDERS, lk.Variant(), judge=lambda *_: given, **options)  # noqa: B023
        assert {row["score"] for row in rows} == {score}
    for given, error in ((float("nan"), ValueError), (2, ValueError), ("yes", TypeError)):
        with pytest.raises(error, match="judge"):
            study_concept(model, SPIDERS, lk.Variant(), judge=lambda *_: given, **options)  # noqa: B023


def test_one_concept_or_a_class_stands_for_a_list():
    from lenskit.study import distinct

    assert distinct(SPIDERS) == [SPIDERS]
    assert distinct(lk.concepts["moods"]) == list(lk.concepts["moods"].values())
    with pytest.raises(TypeError, match="concepts must be Concepts"):
        distinct(["spiders"])


def test_vectors_come_from_a_capture_alone():
    model = tiny.shared_model()
    capture = lk.capture(model, lk.build_prompts(model, SPIDERS, number=24), progress=False)
    tokens = lk.select_tokens(capture)
    labels = lk.soft_labels(capture, tokens)
    alone = lk.fit_vectors(capture, progress=False)
    stepwise = lk.fit_vectors(capture, tokens, labels, learner=lk.SoftCovariance(), progress=False)
    torch.testing.assert_close(alone.directions, stepwise.directions)
