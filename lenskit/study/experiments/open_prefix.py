"""What to do for a concept whose prefix is weak or missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lenskit.concepts import Concept
from lenskit.study.experiments.extraction import (
    NEUTRAL,
    Dictionary,
    FewShot,
    FromAnswers,
    NeutralNegative,
    OtherPrefix,
)
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant


def open_prefix(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    neutral: str = NEUTRAL,
    **options: Any,
) -> Experiment:
    """The recipe beside vectors that need no prefix, or a weaker one.

    The concept's name alone as the prefix; a ``neutral`` prefix in the negative prompts; the stream
    over tokens of answers that show the concept, less that of plain answers to the same questions;
    a few such answers as earlier turns in place of the prefix; and an atom of a dictionary that is
    learnt from the captures without labels. The answers that show the concept are the model's own
    with the prefix, to other questions than the tests': they stand for answers that are given.

    ``options`` as in ``tokens``.
    """
    with begun("open-prefix", model, concepts, options) as run:
        own, judge = Variant("attention", "hard"), run.setting.judge
        ways = [
            Way("prefix", Fitted(own)),
            Way("the concept's name as prefix", OtherPrefix()),
            Way("neutral prefix as negative", NeutralNegative(neutral)),
            Way("answers that show it", FromAnswers(judge)),
            Way("few-shot examples", FewShot(judge)),
            Way("dictionary, no labels", Dictionary()),
        ]
        answers = run.answers([*ways, *controls(own, several=run.several)])
        return run.scored(answers, "How is a concept found whose prefix is weak or missing?")
