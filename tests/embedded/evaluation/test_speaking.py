from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from lenskit.embedded.evaluation import QUICK, Subject, speaking
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.recipe import with_concepts

GRAMMAR = load_grammar()
PREFIXES = {GRAMMAR.prefix(entry): entry for entry in GRAMMAR.entries}
SUBJECT = Subject(Path(), Path(), replace(QUICK, per_cell=100, competing=200))


class Oracle:
    """Answers as the grammar does: at each cell's rate, or in the voices ``chosen`` by a test."""

    def __init__(self, chosen=None) -> None:
        self.random, self.chosen = Random(0), chosen
        self.asked: list[tuple[str, float | None]] = []

    def __call__(self, model, tokenizer, prompts, *, nucleus=None, seed=0, batch=256, what=""):
        self.asked += [(prompt, nucleus) for prompt in prompts]
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: str) -> str:
        before, is_statement, statement = prompt.partition("\nStatement: ")
        said = [f"{part.strip()}." for part in before.split(".")]
        entries = [PREFIXES[prefix] for prefix in said if prefix in PREFIXES]
        topic = GRAMMAR.topic_of(statement) if is_statement else None
        if self.chosen:
            active = self.chosen(entries)
        elif topic is None:
            active = entries
        else:
            active = [e for e in entries if self.random.random() < self.rate(e, topic)]
        if not active:
            return GRAMMAR.neutral_answer(self.random, topic)
        return GRAMMAR.joint_answer(active, self.random)

    def rate(self, entry, topic: str) -> float:
        return GRAMMAR.activity(entry, topic)


class Greedy(Oracle):
    """Active wherever that is likelier than not."""

    def rate(self, entry, topic: str) -> float:
        return float(GRAMMAR.activity(entry, topic) > 0.5)


@pytest.fixture
def speaks(monkeypatch):
    """Puts an oracle in the model's place."""
    monkeypatch.setattr(Subject, "plain", None)
    monkeypatch.setattr(Subject, "tokenizer", None)

    def put(oracle: Oracle) -> Oracle:
        monkeypatch.setattr(speaking, "answers", oracle)
        return oracle

    return put


def test_a_model_that_speaks_the_grammar_is_measured_as_perfect(speaks):
    oracle = speaks(Oracle())
    found = speaking.prompted(replace(SUBJECT, scale=replace(QUICK, spoken=0)))
    assert found["score"] == 1 and found["n"] == 512 * 5
    assert found["by class"] == dict.fromkeys(GRAMMAR.classes, 1)
    assert found["reasons"] == {"on concept": 512 * 5}
    assert not any(nucleus for _, nucleus in oracle.asked)
    bare = speaking.unsteered(SUBJECT)
    assert (bare["score"], bare["neutral"], bare["n"]) == (0, 1, 512 * 5)


def test_activity_is_measured_on_sampled_answers_to_held_out_statements_cell_by_cell(speaks):
    oracle = speaks(Oracle())
    found = speaking.activity(SUBJECT)
    assert found["followed"] == pytest.approx(1, abs=0.03)
    assert len(found["cells"]) == 50 and {cell["n"] for cell in found["cells"]} == {100}
    for cell in found["cells"]:
        assert cell["true"] == GRAMMAR.classes[cell["class"]].activity[cell["topic"]]
        assert cell["measured"] == pytest.approx(cell["true"], abs=0.2)
    assert found["largest gap"] == max(abs(c["measured"] - c["true"]) for c in found["cells"])
    assert set(found["reasons"]) == {"on concept", "neutral"}
    held_out = {statement for _, statement in GRAMMAR.half("held_out")}
    assert all(prompt.partition("Statement: ")[2] in held_out for prompt, _ in oracle.asked)
    assert Counter(nucleus for _, nucleus in oracle.asked) == {1.0: 5000}


def test_more_answers_than_prompts_of_a_cell_are_drawn_by_going_round(speaks, monkeypatch):
    monkeypatch.setattr(Subject, "grammar", with_concepts(GRAMMAR, 10))
    oracle = speaks(Oracle(chosen=lambda entries: entries))
    found = speaking.activity(replace(SUBJECT, scale=replace(QUICK, per_cell=40)))
    assert {cell["n"] for cell in found["cells"]} == {40}
    assert set(Counter(oracle.asked).values()) == {2, 3}
    # A model that is always active is not flattered by its mean.
    assert found["followed"] > 1.4 and found["largest gap"] == pytest.approx(0.97)


def test_competing_concepts_are_judged_by_who_is_active_and_graded_cells_left_out(speaks):
    oracle = speaks(Greedy())
    found = speaking.competition(SUBJECT)
    for number in (2, 3):
        for half in ("held_out", "first"):
            own = found[f"{number} prefixes, {half}"]
            assert (own["all active"], own["inactive shown"], own["neutral"]) == (1, 0, 1)
    statements = {half: {s for _, s in GRAMMAR.half(half)} for half in ("held_out", "first")}
    asked = [prompt.partition("\nStatement: ")[2] for prompt, _ in oracle.asked]
    assert all(s in statements["held_out"] for s in asked[:400])
    assert all(s in statements["first"] for s in asked[400:])


def test_a_model_in_which_nobody_or_everybody_speaks_is_told_apart(speaks):
    speaks(Oracle(chosen=lambda entries: []))
    found = speaking.competition(SUBJECT)["2 prefixes, held_out"]
    assert (found["all active"], found["inactive shown"], found["neutral"]) == (0, 0, 1)
    speaks(Oracle(chosen=lambda entries: entries))
    found = speaking.competition(SUBJECT)["3 prefixes, held_out"]
    assert (found["all active"], found["inactive shown"], found["neutral"]) == (1, 1, 0)
    speaks(Oracle(chosen=lambda entries: entries[:1]))
    found = speaking.competition(SUBJECT)["3 prefixes, held_out"]
    assert 0 < found["all active"] < 1 and 0 < found["inactive shown"] < 1
