"""Vectors added and subtracted: two concepts at once, and a prefix taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any

from lenskit.concepts import Concept, statement_prompt
from lenskit.embedded.evaluation.subject import Subject, mean
from lenskit.embedded.grammar import Entry
from lenskit.embedded.judge import judge_active, parse
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import GRADED
from lenskit.vectors import ConceptVectors

# What the prefix itself adds is 1.
DISPLACEMENTS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def one_for_all(
    scores: Sequence[Sequence[float]], coefficients: Sequence[float], number: int
) -> dict[str, Any]:
    """The best single coefficient: ``scores[i]`` are those of coefficient i, item by item.

    ``held out``: chosen on every other item and scored on the rest, both ways.
    """
    means = [mean(own) for own in scores]
    best = max(range(len(means)), key=means.__getitem__)
    crossed: list[float] = []
    for start in (0, 1):
        halves = [mean(own[start::2]) for own in scores]
        chosen = max(range(len(halves)), key=halves.__getitem__)
        crossed += scores[chosen][1 - start :: 2]
    return {
        "score": means[best],
        "coefficient": coefficients[best],
        "held out": mean(crossed),
        "by coefficient": dict(zip(map(str, coefficients), means, strict=True)),
        "n": number,
    }


def _way(
    subject: Subject, closing: bool
) -> tuple[Sequence[float], Callable[[Concept], ConceptVectors]]:
    """The coefficients that are tried, and what makes a concept's vectors."""
    if closing:
        return DISPLACEMENTS, cache(subject.closing_vectors)
    return subject.scale.coefficients, subject.vectors


def sums(subject: Subject, *, closing: bool = False) -> dict[str, Any]:
    """Two vectors of different classes on bare statements where both concepts are active.

    The share of answers that parse and show both concepts, one coefficient for all pairs.
    ``closing``: each closing token has its own vector, in displacements, instead of the
    attention-guided one for all tokens, in mean residual norms.
    """
    grammar, random = subject.grammar, Random(subject.seed)
    pairs = [
        pair
        for pair in combinations(subject.concepts, 2)
        if pair[0].concept_class != pair[1].concept_class
    ]
    chosen: list[tuple[Concept, Concept]] = []
    asked: list[list[str]] = []
    for pair in random.sample(pairs, len(pairs)):
        rules = [grammar.classes[str(concept.concept_class)] for concept in pair]
        shared = [t for t in grammar.topics if min(r.activity[t] for r in rules) >= GRADED[1]]
        if not shared or len(chosen) == subject.scale.pairs:
            continue
        chosen.append(pair)
        asked.append(
            [
                statement_prompt(random.choice(grammar.statements[topic]["held_out"]))
                for topic in random.choices(shared, k=subject.scale.statements)
            ]
        )
    coefficients, vectors_of = _way(subject, closing)
    joint = [vectors_of(a) + vectors_of(b) for a, b in chosen]
    rows = [
        SteeringRow(question, vectors, coefficient)
        for coefficient in coefficients
        for vectors, questions in zip(joint, asked, strict=True)
        for question in questions
    ]
    texts = iter(generate_steered(subject.model, rows, relative=True))
    both: list[list[float]] = []
    either: list[list[float]] = []
    for _ in coefficients:
        both.append([])
        either.append([])
        for pair, questions in zip(chosen, asked, strict=True):
            names = {(concept.concept_class, concept.name) for concept in pair}
            found = [_voices(str(next(texts))) for _ in questions]
            both[-1].append(mean([float(whole and voices == names) for voices, whole in found]))
            either[-1].append(mean([float(bool(voices & names)) for voices, _ in found]))
    result = one_for_all(both, coefficients, len(chosen))
    return result | {"one of them": one_for_all(either, coefficients, len(chosen))["score"]}


def _voices(text: str) -> tuple[set[tuple[str, str]], bool]:
    """Whose sentences an answer begins with, and whether that is all of it."""
    sentences, rest = parse(text)
    entries: list[Entry] = [s.entry for s in sentences if s.entry is not None]
    return {(e.concept_class, e.name) for e in entries}, not rest


def negative(subject: Subject, *, closing: bool = False) -> dict[str, Any]:
    """Test questions after the prefix, steered against it: neutral and well formed.

    One coefficient for all concepts. ``still on concept``: at that coefficient. ``closing`` as in
    ``sums``.
    """
    tried, vectors_of = _way(subject, closing)
    coefficients = [-c for c in tried]
    rows = [
        SteeringRow(question, vectors_of(concept), coefficient, concept.prefix)
        for coefficient, concept in product(coefficients, subject.concepts)
        for question in concept.questions
    ]
    texts = iter(generate_steered(subject.model, rows, relative=True))
    neutral: list[list[float]] = []
    still: list[list[float]] = []
    for _ in coefficients:
        neutral.append([])
        still.append([])
        for concept in subject.concepts:
            own = [str(next(texts)) for _ in concept.questions]
            name = {(str(concept.concept_class), concept.name)}
            neutral[-1].append(mean([judge_active((), text).score for text in own]))
            still[-1].append(mean([float(bool(_voices(text)[0] & name)) for text in own]))
    result = one_for_all(neutral, coefficients, len(subject.concepts))
    place = coefficients.index(result["coefficient"])
    return result | {"still on concept": mean(still[place])}
