"""The tasks of attention steering, unsteered: instructions near and far, facts, passages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import Any

from lenskit.embedded.evaluation.answers import answers
from lenskit.embedded.evaluation.subject import Subject, mean
from lenskit.embedded.tasks import TASKS, TaskPrompt
from lenskit.embedded.tasks.people import ATTRIBUTES, known_people

LENGTHS = ((0, 0), (10, 40), (40, 100), (100, 150))
NEAR, FAR = LENGTHS[0], LENGTHS[-1]
# Passages of one person, and beside them of three, none of whom was asked about before.
ALONE: Mapping[str, Any] = {"distractors": 0, "asked_before": 0.0}
AMONG: Mapping[str, Any] = {"distractors": 2, "asked_before": 0.0}
FOLLOWED = {"format": ("json", "lines", "xml"), "pronouns": ("they",), "occupation": (None,)}


def _measured(subject: Subject, task: str, prompts: Sequence[TaskPrompt]) -> dict[str, Any]:
    texts = answers(
        subject.plain, subject.tokenizer, [p.messages for p in prompts], batch=64, what=task
    )
    verdicts = [TASKS[task].judge(p, text) for p, text in zip(prompts, texts, strict=True)]
    return {
        "score": mean([verdict.score for verdict in verdicts]),
        "true": mean([prompt.rate for prompt in prompts]),
        "reasons": dict(Counter(verdict.reason for verdict in verdicts)),
        "n": len(prompts),
    }


def instructions(subject: Subject) -> dict[str, Any]:
    """Format, pronouns and occupation by tokens between the instruction and its question."""
    found = {}
    for (task, kinds), length in product(FOLLOWED.items(), LENGTHS):
        each = -(-subject.scale.tasks // len(kinds))
        prompts = [
            prompt
            for kind in kinds
            for prompt in TASKS[task].prompts(
                subject.grammar, each, subject.seed, kind=kind, length=length
            )
        ]
        found[f"{task}, {length[0]} to {length[1]} tokens"] = _measured(subject, task, prompts)
    return found


def knowledge(subject: Subject) -> dict[str, Any]:
    """Facts known by heart and passages about frequent, rare and unseen people; greedy answers.

    ``score`` of a conflict is the share that follows the passage. Frequent and rare are the first
    and the last tenth by rank.
    """
    number, seeds = len(known_people()), count(1_000_000 * subject.seed)
    tenth = number // 10
    ranks = {"frequent": range(1, tenth + 1), "rare": range(number - tenth + 1, number + 1)}
    found = {}
    for name, own in ranks.items():
        people: list[dict[str, Any]] = [
            {"rank": rank, "attribute": a} for rank, a in product(own, ATTRIBUTES)
        ]
        facts = [
            TASKS["fact_question"].prompts(subject.grammar, 1, next(seeds), **person)[0]
            for person in people
        ]
        found[f"facts, {name}"] = _measured(subject, "fact_question", facts)
        conflicts = [
            TASKS["passage"].prompts(
                subject.grammar, 1, next(seeds), kind="conflicts", **ALONE, **person
            )[0]
            for person in people * max(1, round(subject.scale.tasks / len(people)))
        ]
        found[f"conflicts, {name}"] = _measured(subject, "passage", conflicts)
    for name, among in (("unseen, passage", ALONE), ("unseen, passage of three", AMONG)):
        unseen = TASKS["passage"].prompts(
            subject.grammar, subject.scale.tasks, subject.seed, kind="unseen", **among
        )
        found[name] = _measured(subject, "passage", unseen)
    return found
