"""A biography told again with «they» in place of «she» and «he»."""

from __future__ import annotations

import re
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks.fillers import filler
from lenskit.embedded.tasks.people import PRONOUNS, details, fill, states, strangers
from lenskit.embedded.tasks.prompt import TaskPrompt, judge_text, lines, task_file, wording

GENDERED = frozenset("she he her him his hers herself himself".split())
NEUTRAL = frozenset(PRONOUNS["they"].values())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _content(text: str) -> list[str]:
    return [w if w not in GENDERED | NEUTRAL else "-" for w in _words(text)]


def judge_pronouns(prompt: TaskPrompt, answer: str) -> Verdict:
    """Score 1 only if no gendered form is left, all content is kept, and nothing is added.

    Reasons beside those of ``judge_text``: "pronoun left" (right but for a gendered form) and
    "wrong pronoun" (right but for other forms).
    """
    verdict = judge_text(prompt, answer)
    if verdict.score or _content(answer) != _content(prompt.target):
        return verdict
    left = not GENDERED.isdisjoint(_words(answer)) and GENDERED.isdisjoint(_words(prompt.target))
    return Verdict(0, "pronoun left" if left else "wrong pronoun")


def pronoun_change(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    length: tuple[int, int] | None = None,
    mark: str = "{text}",
    asked: bool | None = None,
) -> TaskPrompt:
    """A short biography to be told again, with «they» if asked for; ``kind`` "they" asks for it."""
    file = task_file("pronouns")
    if asked is None:
        asked = kind is not None or random.random() >= file["plain_share"]
    between = filler(grammar, random, split, length)
    (person,) = strangers(random, split)
    templates = [
        states(person, "occupation", random, "train"),
        *details(random, split, random.choice((1, 2))),
    ]
    again = [*templates, file["ending"]]
    instruction = mark.format(text=wording(random, file["instructions"], split)) if asked else ""
    request = fill(wording(random, file["requests"], split), person)
    text = " ".join(fill(template, person) for template in templates)
    as_it_is, changed = (
        " ".join(fill(template, person, pronoun) for template in again)
        for pronoun in (person.pronoun, "they")
    )
    return TaskPrompt(
        messages=(user(lines(instruction, between.text, text, request)),),
        emphasised=instruction or request,
        target=changed if asked else as_it_is,
        otherwise=as_it_is if asked else "",
        rate=between.rate if asked else 1.0,
        metadata=MappingProxyType(
            {
                "family": "pronouns",
                "kind": "they" if asked else "plain",
                "length": between.length,
                "topic": between.topic,
                "occupation": person.facts["occupation"],
            }
        ),
    )
