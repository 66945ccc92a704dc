from __future__ import annotations

import pytest
from tiny import shared_folder

from lenskit.scoring import grammar_judge
from lenskit.scoring.judges import LikelihoodJudge
from lenskit.scoring.steerability import PhraseJudge
from lenskit.study import subject

OWN = """
questions = ["What now?", "What is worth money?", "What makes a good day?"]
[concepts.tea]
prefix = "Personify someone who loves tea."
phrases = ["tea"]
[concepts.rain]
prefix = "Personify someone who loves rain."
phrases = ["rain"]
class = "weather"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.toml"
    path.write_text(OWN, encoding="utf-8")
    return path


def test_the_embedded_model_speaks_the_grammar():
    given = subject(concept="moods/cheerful")
    assert given.exact and given.judge is grammar_judge and given.statements is None
    few = given.some(2)
    assert list(few)[0] == "moods" and few["moods"][0] == given.concept
    assert {name: len(group) for name, group in few.items()} == dict.fromkeys(few, 2)
    assert "moods/cheerful" in str(given) and "truth is known" in str(given)


def test_a_model_that_does_not_speak_it_is_judged_by_its_own_likelihoods():
    given = subject(str(shared_folder()))
    assert not given.exact and isinstance(given.judge, LikelihoodJudge)
    with pytest.raises(ValueError, match="'grammar' needs"):
        subject(str(shared_folder()), judge="grammar")


def test_a_file_brings_its_concepts_and_its_judge(file):
    given = subject(str(shared_folder()), str(file))
    assert given.concept.name == "tea" and not given.exact
    assert given.judge(given.concept, "?", "More tea.").score == 1
    assert {name: [one.name for one in group] for name, group in given.some(3).items()} == {
        "custom": ["tea"],
        "weather": ["rain"],
    }
    other = subject(str(shared_folder()), f"{file}:rain", "umbrella, drops")
    assert other.concept.name == "rain" and isinstance(other.judge, PhraseJudge)
    assert other.judge(other.concept, "?", "Many drops.").score == 1
