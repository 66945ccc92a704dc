"""The grammar judge is refused where it could give nothing but 0."""

from __future__ import annotations

import warnings

import pytest
import tiny

import lenskit as lk
from lenskit.scoring import check_grammar_judge

SPIDERS = lk.concepts["fears"]["spiders"]
OPTIONS = dict(coefficients=1.0, prompts=12, max_new_tokens=4, progress=False)


def test_a_study_refuses_the_grammar_judge_for_a_model_that_does_not_speak_the_grammar(tmp_path):
    with pytest.raises(ValueError, match="this model says none of them; give judge=.*phrase_judge"):
        lk.run_study(tiny.shared_model(), SPIDERS, out=tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("*.json"))


def test_a_study_refuses_the_grammar_judge_for_a_concept_of_ones_own_before_it_runs():
    own = lk.Concept("Be shy.", "shy", questions=("Who?", "Why?", "Where?"))
    with pytest.raises(ValueError, match="'shy' of class None is not in the embedded grammar"):
        lk.run_study(tiny.shared_model(), [SPIDERS, own], **OPTIONS)


def test_the_embedded_model_speaks_the_grammar():
    check_grammar_judge(lk.load_model(check=False), [SPIDERS, lk.concepts["moods"]["cheerful"]])


def test_a_prompted_control_near_zero_is_warned_of_once():
    model, ways = tiny.shared_model(), lk.variants(controls="prompted")
    concepts = [SPIDERS, lk.concepts["moods"]["cheerful"]]
    with pytest.warns(UserWarning, match="prompted control scores 0.00 over 10 answers") as found:
        lk.run_study(model, concepts, ways, judge=lambda *_: 0, **OPTIONS)
    assert sum("prompted control" in str(one.message) for one in found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lk.run_study(model, concepts, ways, judge=lambda *_: 1, **OPTIONS)
