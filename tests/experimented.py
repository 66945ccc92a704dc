"""A tiny random model, concepts of one's own and a judge that any answer may please."""

from __future__ import annotations

import tiny

from lenskit.concepts import Concept
from lenskit.scoring import Verdict

QUESTIONS = ("Who?", "Why?", "Where to?")
CONCEPTS = (
    Concept("Take on a cheerful mood.", "cheerful", "moods", QUESTIONS),
    Concept("Personify someone who is terrified of spiders.", "spiders", "fears", QUESTIONS),
)
STATEMENTS = tuple(f"{word} is {how}." for word in ("Rain", "Tea", "Sand") for how in "abcdefgh")
OPTIONS = dict(
    coefficients=(0.5, 2.0),
    prompts=24,
    statements=STATEMENTS,
    max_new_tokens=5,
    questions=("Why?", "Rain?"),
    progress=False,
)


class ByTheText:
    """Scores an answer by its text alone."""

    identity = "by the text alone"

    def __call__(self, concept: Concept, question: str, answer: str) -> Verdict:
        score = sum(map(ord, answer + question + concept.name)) % 2
        return Verdict(score, "on concept" if score else "off concept")


def run(experiment, concepts=CONCEPTS, **more):
    """The experiment on the tiny model."""
    options = OPTIONS | {"judge": ByTheText()} | more
    return experiment(tiny.shared_model(), concepts, **options)


def answers_of(found, way: str, concept: str = "cheerful", coefficient: float = 2.0):
    """The rows of one way, concept and coefficient of the budget."""
    rows = found.answers
    own = rows[(rows.way == way) & (rows.concept == concept) & (rows.coefficient == coefficient)]
    assert len(own)
    return own
