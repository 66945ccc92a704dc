from __future__ import annotations

import re

import pytest
from browser import browser, needs_chromium, page
from steered import random_vectors
from tiny import shared_model

from lenskit.concepts import Concept
from lenskit.figures import Play, play
from lenskit.generation import generate
from lenskit.scoring import Verdict
from lenskit.steering import steer

QUESTIONS = ("What now?", "Who </script> there?")


def judge(concept: Concept, question: str, answer: str) -> Verdict:
    return Verdict(0, "neutral")


@pytest.fixture(scope="module")
def game() -> Play:
    model = shared_model()
    return play(
        model,
        random_vectors(model),
        QUESTIONS,
        coefficients=(0.0, 0.5, 1.0),
        blocks={"all": None, "the first": (0,)},
        concept=Concept("Take on a cheerful mood."),
        judge=judge,
        max_new_tokens=6,
    )


def test_every_setting_has_the_answer_that_steering_gives(game):
    assert len(game.table) == 2 * 2 * 3
    assert set(game.table["verdict"]) == {"neutral"}
    for name, blocks in (("all", None), ("the first", (0,))):
        with steer(shared_model(), game.vectors, coefficient=0.5, blocks=blocks, relative=True):
            expected = generate(shared_model(), list(QUESTIONS), max_new_tokens=6)
        rows = game.table[(game.table["blocks"] == name) & (game.table["coefficient"] == 0.5)]
        assert rows["answer"].tolist() == [str(one) for one in expected]


def test_without_scripts_a_table_of_all_settings_is_left(game):
    shown = game._repr_html_()
    assert shown.count("<tr") == 1 + len(game.table)
    assert len(repr(game)) < 40
    assert shown.count("</script>") == 2  # the data's and the program's: no question ends one


@needs_chromium
def test_controls_stand_above_the_table_where_scripts_run(game, tmp_path):
    dom = browser(page(tmp_path / "play.html", game._repr_html_()), "--dump-dom")
    assert dom.count('type="range"') == 1 and dom.count("<select") == 2
    middle = game.table.query("blocks == 'all' and coefficient == 0.5").iloc[0]
    said = re.search(r"<p [^>]*>(.*?)</p>", dom, re.DOTALL)
    assert said and said[1].endswith("(neutral)")
    assert middle["answer"][:4].strip("<>&") in said[1]
    assert "<details>" in dom


def test_with_a_kernel_any_setting_is_answered(game):
    box = game.live()
    question, coefficient, blocks, shown = box.children
    question.value = "How are you?"
    coefficient.value = 0.0
    plain = shown.value
    unsteered = generate(shared_model(), ["How are you?"], max_new_tokens=6)[0]
    assert game.answer("How are you?", 0.0) == str(unsteered)
    blocks.value = (1,)
    coefficient.value = coefficient.max
    assert shown.value.startswith("<p") and plain.startswith("<p")
    assert game.answer("How are you?", 1.0, [1]) == _steered("How are you?", 1.0, [1], game)


def _steered(question, coefficient, blocks, game):
    with steer(shared_model(), game.vectors, coefficient=coefficient, blocks=blocks, relative=True):
        return str(generate(shared_model(), [question], max_new_tokens=6)[0])


@pytest.mark.parametrize("given", [{"questions": "What?"}, {"coefficients": ()}, {"blocks": {}}])
def test_an_empty_choice_is_refused(given):
    settings = {"questions": QUESTIONS, "coefficients": (0.1,), "blocks": None} | given
    with pytest.raises(ValueError, match="each be a list"):
        play(shared_model(), random_vectors(shared_model()), **settings)
