"""The optimised vector as one of the ways, and answers of a model that is told the concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from lenskit.causal import optimise
from lenskit.concepts import Concept, statement_prompt, statements
from lenskit.embedded.grammar import load_grammar
from lenskit.generation import generate
from lenskit.scoring import Judge, as_verdict
from lenskit.study.experiments.bench import Bench
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors


@dataclass(frozen=True)
class Expressing:
    """Questions, never the test questions, and answers to them.

    ``shown``: the model's answers with the prefix that show the concept, as the judge sees it, or
    all of them where none does. ``plain``: those to the same questions without the prefix.
    """

    questions: tuple[str, ...]
    shown: tuple[str, ...]
    plain: tuple[str, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Question and answer that shows the concept."""
        return list(zip(self.questions, self.shown, strict=True))


def expressing(bench: Bench, judge: Judge, number: int = 40, tokens: int = 50) -> Expressing:
    """Up to ``number`` answers that show the concept, to statements and to paraphrases.

    Paraphrases of the test questions are known of concepts of the embedded grammar alone.
    """
    concept = bench.concept
    about = statements("first") if bench.statements is None else bench.statements
    asked = [*_paraphrases(concept)[: number // 2]]
    asked += [statement_prompt(each) for each in about[: number - len(asked)]]
    prefixed = [f"{concept.prefix} {each}" for each in asked]
    answers = generate(bench.model, [*prefixed, *asked], max_new_tokens=tokens)
    shown, plain = answers[: len(asked)], answers[len(asked) :]
    scores = [
        as_verdict(judge(concept, question, answer)).score
        for question, answer in zip(asked, shown, strict=True)
    ]
    kept = [i for i, score in enumerate(scores) if score >= 0.5] or list(range(len(asked)))
    # An answer without a token has nothing to learn from.
    kept = [i for i in kept if shown[i].token_ids and plain[i].token_ids]
    if not kept:
        raise ValueError(f"the model's answers with the prefix of {concept.name!r} are empty")
    return Expressing(
        *(tuple(str(texts[i]) for i in kept) for texts in (asked, shown, plain)),
    )


@dataclass(frozen=True)
class OptimisedVector:
    """The vector of one block that makes answers of the concept likely; the block of least loss.

    ``blocks``: those that are tried.
    """

    blocks: tuple[int, ...]
    judge: Judge
    steps: int = 60

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        made = bench.vectors(Variant())
        assert made is not None
        pairs = expressing(bench, self.judge).pairs
        found = optimise(
            bench.model,
            pairs,
            made.resid_norm,
            blocks=self.blocks,
            steps=self.steps,
            seed=bench.seed,
        )
        best = int(found.losses.argmin())
        directions = torch.zeros_like(made.directions)
        directions[found.blocks[best]] = torch.nn.functional.normalize(
            found.directions[best], dim=0
        )
        return replace(
            made,
            directions=directions,
            validation=torch.full_like(made.validation, float("nan")),
            learner="optimised on answers",
            selection="all tokens",
            labels="answers",
        )


@cache
def _paraphrases(concept: Concept) -> Sequence[str]:
    rules = load_grammar().classes.get(concept.concept_class or "")
    if rules is None or concept.name not in rules.entries:
        return ()
    return tuple(
        text for wordings in rules.questions for text in wordings if text not in concept.questions
    )
