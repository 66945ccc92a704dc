"""The exact judge of the embedded grammar, and whether a model speaks it at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lenskit.concepts import Concept, question_prompt
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.judge import Verdict, judge_answer, parse
from lenskit.generation import generate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_OTHERWISE = "phrase_judge, likelihood_judge, endpoint_judge or a judge of your own"


def grammar_judge(concept: Concept, question: str, answer: str) -> Verdict:
    """The exact judge of the embedded grammar: 1 only if the whole answer is the concept's.

    An answer of ``generate`` that ran out of ``max_new_tokens`` is "unfinished". Raises ValueError
    for a concept that the grammar does not know.

    >>> lk.grammar_judge(concept, concept.questions[0], "I like tea.").score
    0
    """
    _known(concept)
    verdict = judge_answer(concept.concept_class or "", concept.name, answer)
    # A generated answer knows whether it was cut, which between two sentences its text cannot show.
    if verdict.score and not getattr(answer, "finished", True):
        return Verdict(0, "unfinished")
    return verdict


def check_grammar_judge(model: TransformerBridge, concepts: Iterable[Concept]) -> None:
    """Raise ValueError where the grammar judge could give nothing but 0.

    That is for concepts that the grammar does not know, and for a model that says no sentence of
    the grammar even with a concept's prefix before its questions.
    """
    concepts = list(concepts)
    for concept in concepts:
        _known(concept)
    asked = [question_prompt(q, concepts[0].prefix) for q in concepts[0].questions]
    # Whole sentences at the start: a loop of anything else is not the grammar either.
    if asked and not any(parse(answer)[0] for answer in generate(model, asked)):
        raise ValueError(
            "the judge is grammar_judge, which knows the sentences of the embedded model alone, "
            f"and this model says none of them; give judge=…: {_OTHERWISE}"
        )


def _known(concept: Concept) -> None:
    rules = load_grammar().classes.get(concept.concept_class or "")
    if rules is None or concept.name not in rules.entries:
        raise ValueError(
            f"concept {concept.name!r} of class {concept.concept_class!r} is not in the embedded "
            f"grammar, which grammar_judge knows alone; give {_OTHERWISE}"
        )
