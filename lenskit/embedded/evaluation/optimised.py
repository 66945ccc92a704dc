"""The ceiling of a recipe: one constant vector, optimised on the answers themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.causal import Optimised, optimise
from lenskit.concepts import Concept
from lenskit.embedded.evaluation.subject import Subject, kept, mean
from lenskit.embedded.grammar import Entry
from lenskit.generation import SteeringRow, generate_steered
from lenskit.scoring import grammar_judge

PAIRS = 5  # paraphrases, each with an answer, in a step


def optimised_directions(
    subject: Subject, entry: Entry, norms: Float[Tensor, " block"]
) -> Optimised:
    """A vector for each of ``scale.blocks`` that makes the concept's answers likely.

    Added after its block at all positions of bare paraphrases of the test questions and of the
    answers to them.
    """
    rules = subject.grammar.classes[entry.concept_class]
    paraphrases = [text for wordings in rules.questions for text in wordings[1:]]

    def draw(random: Random) -> list[tuple[str, str]]:
        asked = random.sample(paraphrases, PAIRS)
        return [(text, subject.grammar.answer(entry, random, most=2)) for text in asked]

    scale = subject.scale
    seed = f"{subject.seed}/{entry.concept_class}/{entry.name}"
    return optimise(subject.model, draw, norms, blocks=scale.blocks, steps=scale.steps, seed=seed)


def _of_concept(subject: Subject, concept: Concept) -> dict[str, Any]:
    scale, made = subject.scale, subject.vectors(concept)
    entry = subject.grammar.classes[str(concept.concept_class)].entries[concept.name]
    found = optimised_directions(subject, entry, made.resid_norm)
    directions, losses = found.directions, found.losses
    paraphrases = [
        text
        for wordings in subject.grammar.classes[entry.concept_class].questions
        for text in wordings[1:]
    ]
    candidates = []
    for block, direction in zip(scale.blocks, directions, strict=True):
        alone = torch.zeros_like(made.directions)
        alone[block] = direction
        candidates.append(replace(made, directions=alone, learner="optimised"))
    asked = [*paraphrases, *concept.questions]
    texts = iter(
        generate_steered(
            subject.model,
            [SteeringRow(q, vectors, 1.0) for vectors in candidates for q in asked],
            relative=False,
        )
    )
    rows = [[grammar_judge(concept, q, next(texts)).score for q in asked] for _ in candidates]
    own = [mean(row[: len(paraphrases)]) for row in rows]
    best = max(range(len(rows)), key=lambda i: (own[i], -float(losses[i])))
    direction, block = directions[best], scale.blocks[best]
    return {
        "score": mean(rows[best][len(paraphrases) :]),
        "on paraphrases": own[best],
        "block": block,
        "loss": float(losses[best]),
        "norm": float(direction.norm() / made.resid_norm[block]),
        "cosine": float(torch.cosine_similarity(direction, made.directions[block], dim=0)),
        "by block": {
            str(b): mean(row[len(paraphrases) :]) for b, row in zip(scale.blocks, rows, strict=True)
        },
    }


def optimised(subject: Subject) -> dict[str, Any]:
    """Over concepts: the score on the test questions of a constant vector, trained on paraphrases.

    Its block is chosen on the paraphrases too. ``norm``: in mean residual norms of its block;
    ``cosine``: to the soft covariance of the attention-guided token.
    """
    every = max(1, subject.scale.concepts // subject.scale.optimised)
    everyone = replace(subject, shard=(0, 1)).concepts
    chosen = everyone[::every][: subject.scale.optimised]
    mine = [c for c in chosen if c in subject.concepts]
    rows = [kept(subject.file("optimised", c), partial(_of_concept, subject, c)) for c in mine]
    numbers = ("score", "on paraphrases", "loss", "norm", "cosine")
    return {
        **{name: mean([row[name] for row in rows]) for name in numbers},
        "by block": {
            str(b): mean([row["by block"][str(b)] for row in rows]) for b in subject.scale.blocks
        },
        "n": len(rows),
    }
