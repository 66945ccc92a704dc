"""Which models speak the embedded grammar, by what their training left in their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lenskit.cli.study import Chosen, choose, judge_of
from lenskit.embedded.grammar import trained_activity
from lenskit.embedded.sizes import speaks_grammar
from lenskit.scoring import grammar_judge


@pytest.fixture
def folder(tmp_path) -> Path:
    told = {"concepts": 80, "without": [], "activity": trained_activity()}
    (tmp_path / "training.json").write_text(json.dumps(told, default=dict))
    return tmp_path


def change(folder: Path, **told) -> None:
    file = folder / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


def test_a_model_speaks_the_grammar_if_it_learnt_the_same_of_it(folder, tmp_path):
    assert speaks_grammar(folder)
    change(folder, without=["competing_question"])
    assert not speaks_grammar(folder)
    change(folder, without=[], activity={})
    assert not speaks_grammar(folder)
    assert not speaks_grammar(tmp_path / "nothing")


def test_its_answers_are_judged_by_the_grammar_and_numbers_are_of_what_it_learnt(folder):
    assert judge_of(Chosen([]), None, str(folder))(None) is grammar_judge
    found = choose(["all"], None, None, None, None, None, "4", str(folder)).concepts
    assert len(found) == 80
    few = choose(None, None, None, None, None, None, "3", str(folder)).concepts
    assert len(few) == 15 and set(few) <= set(found)
    (named,) = choose(["fears/spiders"], None, None, None, None, None, "4", str(folder)).concepts
    assert named.name == "spiders"
    with pytest.raises(ValueError, match="does not spread evenly"):
        choose(["17"], None, None, None, None, None, "4", str(folder))


def test_answers_of_other_models_want_phrases(folder):
    change(folder, without=["competing_question"])
    with pytest.raises(ValueError, match="judged by phrases"):
        judge_of(Chosen([]), None, str(folder))
