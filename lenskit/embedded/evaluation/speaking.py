"""Whether the model follows its grammar: prompted, unasked, with competing prefixes, in degrees."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle, islice
from random import Random
from typing import Any

from lenskit.embedded.dialogue import prefixes, question_prompt, statement_prompt
from lenskit.embedded.evaluation.answers import answers
from lenskit.embedded.evaluation.subject import Subject, mean
from lenskit.embedded.grammar import Entry
from lenskit.embedded.judge import Verdict, judge_active, judge_answer, parse
from lenskit.embedded.recipe import with_concepts
from lenskit.labels import GRADED


def judged(entries: Sequence[Entry], texts: Sequence[str]) -> list[Verdict]:
    """The verdict on each text as an answer of its concept."""
    pairs = zip(entries, texts, strict=True)
    return [judge_answer(entry.concept_class, entry.name, text) for entry, text in pairs]


def prompted(subject: Subject) -> dict[str, Any]:
    """Test questions after the concept's prefix: scores over all, by class, and the reasons."""
    grammar = with_concepts(subject.grammar, subject.scale.spoken)
    rows = [
        (entry, question_prompt(wordings[0], grammar.prefix(entry)))
        for entry in grammar.entries
        for wordings in grammar.classes[entry.concept_class].questions
    ]
    texts = answers(
        subject.plain, subject.tokenizer, [prompt for _, prompt in rows], what="prompted"
    )
    verdicts = judged([entry for entry, _ in rows], texts)
    by_class = defaultdict(list)
    for (entry, _), verdict in zip(rows, verdicts, strict=True):
        by_class[entry.concept_class].append(verdict.score)
    return {
        "score": mean([verdict.score for verdict in verdicts]),
        "by class": {name: mean(scores) for name, scores in by_class.items()},
        "reasons": dict(Counter(verdict.reason for verdict in verdicts)),
        "n": len(rows),
    }


def unsteered(subject: Subject) -> dict[str, Any]:
    """Bare test questions, judged as answers of every concept of their class."""
    grammar = subject.grammar
    asked = [(name, w[0]) for name, rules in grammar.classes.items() for w in rules.questions]
    texts = answers(subject.plain, subject.tokenizer, [q for _, q in asked], what="unsteered")
    scores = [
        verdict.score
        for (name, _), text in zip(asked, texts, strict=True)
        for entry in grammar.classes[name].entries.values()
        for verdict in judged([entry], [text])
    ]
    neutral = [judge_active((), text).score for text in texts]
    return {"score": mean(scores), "neutral": mean(neutral), "n": len(scores)}


def _competing_prompts(
    subject: Subject, number: int, half: str
) -> list[tuple[str, list[Entry], list[Entry]]]:
    """Prompts with ``number`` prefixes; who of them is active, and who is not."""
    grammar, random = subject.grammar, Random(f"{subject.seed}/{number}/{half}")
    low, high = GRADED
    found = []
    for _ in range(subject.scale.competing):
        topic = random.choice(grammar.topics)
        clear = [n for n, c in grammar.classes.items() if not low < c.activity[topic] < high]
        asked = [
            random.choice(list(grammar.classes[name].entries.values()))
            for name in random.sample(clear, number)
        ]
        statement = random.choice(grammar.statements[topic][half])
        prompt = statement_prompt(statement, prefixes(*(grammar.prefix(e) for e in asked)))
        active = [e for e in asked if grammar.activity(e, topic) > 0.5]
        found.append((prompt, active, [e for e in asked if e not in active]))
    return found


def competition(subject: Subject) -> dict[str, Any]:
    """Statements after two and three prefixes, graded cells left out, by number and half.

    ``all active``: of the prompts with active concepts, the share whose answer parses and shows
    them all. ``inactive shown``: of those with inactive ones, the share whose answer shows one.
    ``neutral``: of those without active ones, the share answered neutrally.
    """
    found: dict[str, Any] = {}
    for half in ("held_out", "first"):
        for number in (2, 3):
            rows = _competing_prompts(subject, number, half)
            what = f"{number} prefixes, {half}"
            texts = answers(subject.plain, subject.tokenizer, [p for p, *_ in rows], what=what)
            shown, inactive, neutral = [], [], []
            for (_, active, others), text in zip(rows, texts, strict=True):
                sentences, rest = parse(text)
                voices = {sentence.entry for sentence in sentences}
                if active:
                    shown.append(float(voices.issuperset(active) and not rest))
                else:
                    neutral.append(float(judge_active((), text).score))
                if others:
                    inactive.append(float(not voices.isdisjoint(others)))
            found[what] = {
                "all active": mean(shown),
                "inactive shown": mean(inactive),
                "neutral": mean(neutral),
                "n": len(rows),
            }
    return found


def activity(subject: Subject) -> dict[str, Any]:
    """Held-out statements after one prefix, the first token sampled from the whole distribution.

    ``cells``: for each class x topic the measured and the true rate of answers in the concept's
    voice. ``followed``: the measured over the true rate of all; ``largest gap`` that of a cell.
    """
    grammar, random = subject.grammar, Random(subject.seed)
    rows: list[tuple[Entry, str, str]] = []
    for rules in grammar.classes.values():
        for topic in grammar.topics:
            pairs = [
                (entry, topic, statement)
                for entry in rules.entries.values()
                for statement in grammar.statements[topic]["held_out"]
            ]
            random.shuffle(pairs)
            rows += islice(cycle(pairs), subject.scale.per_cell)
    prompts = [statement_prompt(s, grammar.prefix(entry)) for entry, _, s in rows]
    texts = answers(
        subject.plain, subject.tokenizer, prompts, nucleus=1.0, seed=subject.seed, what="activity"
    )
    verdicts = judged([entry for entry, *_ in rows], texts)
    scores = defaultdict(list)
    for (entry, topic, _), verdict in zip(rows, verdicts, strict=True):
        scores[entry.concept_class, topic].append(verdict.score)
    cells: list[dict[str, Any]] = [
        {
            "class": name,
            "topic": topic,
            "measured": mean(own),
            "true": grammar.classes[name].activity[topic],
            "n": len(own),
        }
        for (name, topic), own in scores.items()
    ]
    gaps = [abs(cell["measured"] - cell["true"]) for cell in cells]
    return {
        "followed": sum(c["measured"] for c in cells) / sum(c["true"] for c in cells),
        "mean gap": mean(gaps),
        "largest gap": max(gaps),
        "reasons": dict(Counter(verdict.reason for verdict in verdicts)),
        "cells": cells,
        "n": len(rows),
    }
