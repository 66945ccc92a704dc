from __future__ import annotations

import json

import pytest

from lenskit.embedded.evaluation import Subject, kept
from lenskit.embedded.evaluation.arithmetic import one_for_all
from lenskit.embedded.evaluation.subject import mean, mean_of
from lenskit.embedded.grammar import load_grammar, trained_activity


def test_what_is_kept_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"found": 3}

    file = tmp_path / "deep" / "part.json"
    assert kept(file, make) == kept(file, make) == {"found": 3}
    assert made == [1] and json.loads(file.read_text()) == {"found": 3}
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "other.json", lambda: {"found": 1 / 0})
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_one_coefficient_for_all_is_also_chosen_on_others():
    # The first coefficient serves the even items, the second all but one of the odd ones.
    scores = [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0]]
    found = one_for_all(scores, (0.1, 0.2), 6)
    assert (found["score"], found["coefficient"], found["n"]) == (0.5, 0.1, 6)
    assert found["held out"] == 0
    assert found["by coefficient"] == {"0.1": 0.5, "0.2": pytest.approx(1 / 3)}


def test_a_mean_comes_with_its_interval_and_number():
    found = mean_of([0.0, 1.0] * 50)
    assert found["mean"] == 0.5 and found["n"] == 100
    assert found["low"] == pytest.approx(0.4, abs=0.02)
    assert found["high"] == pytest.approx(0.6, abs=0.02)
    assert mean_of([0.3, 0.3])["low"] == 0.3 and mean([]) != mean([])


def test_a_model_is_measured_against_the_activity_that_it_was_trained_on(tmp_path):
    grammar = load_grammar()
    assert Subject(tmp_path, tmp_path).grammar is grammar
    told = {name: dict(rules.activity) | {"food": 0.5} for name, rules in grammar.classes.items()}
    (tmp_path / "training.json").write_text(json.dumps({"activity": told}))
    subject = Subject(tmp_path, tmp_path)
    assert {c.activity["food"] for c in subject.grammar.classes.values()} == {0.5}
    assert subject.grammar.entries == grammar.entries and not subject.truth_is_shared
    told = {name: dict(activity) for name, activity in trained_activity().items()}
    (tmp_path / "training.json").write_text(json.dumps({"activity": told}))
    assert Subject(tmp_path, tmp_path).truth_is_shared
