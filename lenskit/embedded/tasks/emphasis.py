"""Marked spans (quoted, starred, repeated) and solved examples before the question."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import assistant
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks.fillers import draw_length, raised
from lenskit.embedded.tasks.formats import format_request, judge_format
from lenskit.embedded.tasks.occupation import judge_occupation, occupation
from lenskit.embedded.tasks.prompt import Builder, Judge, TaskPrompt, task_file
from lenskit.embedded.tasks.pronouns import judge_pronouns, pronoun_change

FAMILIES: dict[str, tuple[Builder, Judge]] = {
    "format": (format_request, judge_format),
    "pronouns": (pronoun_change, judge_pronouns),
    "occupation": (occupation, judge_occupation),
}


def judge_family(prompt: TaskPrompt, answer: str) -> Verdict:
    """The judge of the task that the prompt was made from."""
    return FAMILIES[prompt.metadata["family"]][1](prompt, answer)


def marked_span(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    family: str | None = None,
    mark: str | None = None,
    length: tuple[int, int] | None = None,
) -> TaskPrompt:
    """A prompt of ``family`` whose span is marked; that leaves fewer failures at a distance."""
    file = task_file("emphasis")
    family = family or random.choice(list(FAMILIES))
    mark = mark or random.choice(list(file["marks"][split]))
    template = {**file["marks"]["train"], **file["marks"]["held_out"]}[mark]
    length = length or draw_length(random, "emphasis")
    prompt = FAMILIES[family][0](grammar, random, split, length=length, mark=template, asked=True)
    return replace(
        prompt,
        rate=raised(prompt.rate, file["mark_failures"]),
        metadata=MappingProxyType({**prompt.metadata, "mark": mark}),
    )


def solved_examples(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    family: str | None = None,
    examples: int | None = None,
    length: tuple[int, int] | None = None,
) -> TaskPrompt:
    """One to three correct examples as earlier turns, then a prompt; each leaves fewer failures.

    Examples have their instruction and no filler.
    """
    file = task_file("emphasis")
    family = family or random.choice(list(FAMILIES))
    build = FAMILIES[family][0]
    if examples is None:
        examples = int(random.choices(list(file["examples"]), file["examples"].values())[0])
    length = length or draw_length(random, "emphasis")
    prompt = build(grammar, random, split, length=length, asked=True)
    kind = prompt.metadata["kind"]
    turns: list = []
    for _ in range(examples):
        solved = build(grammar, random, split, length=(0, 0), kind=kind, asked=True)
        turns += [*solved.messages, assistant(solved.target)]
    return replace(
        prompt,
        messages=(*turns, *prompt.messages),
        rate=raised(prompt.rate, file["example_failures"] ** examples),
        metadata=MappingProxyType({**prompt.metadata, "examples": examples}),
    )
