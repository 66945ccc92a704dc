"""A requested format, each parsed exactly, and two requests that compete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from xml.etree import ElementTree

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks.fillers import filler
from lenskit.embedded.tasks.people import Person, fill, states, strangers
from lenskit.embedded.tasks.prompt import TaskPrompt, lines, task_file, wording

FORMATS = ("json", "lines", "xml")
FIELDS = ("name", "occupation")
_PATTERNS = {
    "json": re.compile(r"\{[^{}]*\}"),
    "lines": re.compile(r"name: [^\n]+\noccupation: \w+"),
    "xml": re.compile(r"<person>.*?</person>", re.DOTALL),
    "plain": re.compile(r"(\w+ \w+) works as an? (\w+)\."),
}


def write(kind: str, person: Person) -> str:
    """Name and occupation of a person in one of ``FORMATS``, or as a plain sentence ("plain")."""
    name, occupation = person.name, person.facts["occupation"]
    if kind == "json":
        return json.dumps({"name": name, "occupation": occupation})
    if kind == "lines":
        return f"name: {name}\noccupation: {occupation}"
    if kind == "xml":
        return f"<person><name>{name}</name><occupation>{occupation}</occupation></person>"
    return fill(task_file("formats")["plain"], person)


def read(kind: str, text: str) -> Mapping[str, str] | None:
    """The fields that a text holds in one of the formats, or None where it does not parse."""
    found: dict = {}
    if kind == "json":
        try:
            found = json.loads(text)
        except ValueError:
            return None
    elif kind == "lines":
        found = dict(re.findall(r"^(\w+): (.+)$", text, re.MULTILINE))
        if len(text.split("\n")) != len(found):
            return None
    elif kind == "xml":
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError:
            return None
        found = {child.tag: child.text for child in root} if root.tag == "person" else {}
    elif match := _PATTERNS["plain"].fullmatch(text):
        found = dict(zip(FIELDS, match.groups(), strict=True))
    whole = isinstance(found, dict) and tuple(found) == FIELDS
    return found if whole and all(isinstance(v, str) for v in found.values()) else None


def judge_format(prompt: TaskPrompt, answer: str) -> Verdict:
    """Score 1 only if the whole answer parses in the requested format and its content is right.

    Reasons: "correct", "empty", "other format", "extra text", "ill formed", "wrong content".
    """
    text, kind = answer.strip(), prompt.metadata["kind"]
    if not text:
        return Verdict(0, "empty")
    if (found := read(kind, text)) is not None:
        right = found == read(kind, prompt.target)
        return Verdict(int(right), "correct" if right else "wrong content")
    if any(read(other, text) is not None for other in (*FORMATS, "plain")):
        return Verdict(0, "other format")
    part = _PATTERNS[kind].search(text)
    whole = part is not None and read(kind, part.group()) is not None
    return Verdict(0, "extra text" if whole else "ill formed")


def _text(people: list[Person], random: Random, split: str) -> str:
    """The first person's occupation, and in most texts something about the second one."""
    said = [states(people[0], "occupation", random, split)]
    if random.random() < task_file("formats")["distractor_share"]:
        said.append(states(people[1], "occupation", random, split))
        random.shuffle(said)
    else:
        said.append(states(people[0], random.choice(("town", "instrument")), random, split))
    return " ".join(said)


def _instruction(kind: str, random: Random, split: str) -> str:
    file = task_file("formats")
    return wording(random, file["instructions"], split).format(format=file["phrases"][kind])


def format_request(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    length: tuple[int, int] | None = None,
    mark: str = "{text}",
    asked: bool | None = None,
) -> TaskPrompt:
    """Name and occupation from a short text, in a requested format or in a plain sentence."""
    file = task_file("formats")
    if asked is None:
        asked = kind is not None or random.random() >= file["plain_share"]
    kind = (kind or random.choice(FORMATS)) if asked else "plain"
    between = filler(grammar, random, split, length)
    people = strangers(random, split, 2)
    instruction = mark.format(text=_instruction(kind, random, split)) if asked else ""
    question = fill(wording(random, file["questions"], split), people[0])
    return TaskPrompt(
        messages=(user(lines(instruction, between.text, _text(people, random, split), question)),),
        emphasised=instruction or question,
        target=write(kind, people[0]),
        otherwise=write("plain", people[0]) if asked else "",
        rate=between.rate if asked else 1.0,
        metadata=MappingProxyType(
            {"family": "format", "kind": kind, "length": between.length, "topic": between.topic}
        ),
    )


def competing_formats(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kinds: tuple[str, str] | None = None,
    emphasise: str | None = None,
) -> TaskPrompt:
    """Two requested formats: mostly the later one wins, in some pairs not; either is emphasised."""
    file = task_file("formats")
    earlier, later = kinds or random.sample(FORMATS, 2)
    emphasise = emphasise or random.choice(("earlier", "later"))
    people = strangers(random, split, 2)
    instructions = [_instruction(kind, random, split) for kind in (earlier, later)]
    question = fill(wording(random, file["questions"], split), people[0])
    first = emphasise == "earlier"
    rate = file["later"][earlier][later]
    return TaskPrompt(
        messages=(user(lines(" ".join(instructions), _text(people, random, split), question)),),
        emphasised=instructions[0 if first else 1],
        target=write(earlier if first else later, people[0]),
        otherwise=write(later if first else earlier, people[0]),
        rate=1 - rate if first else rate,
        metadata=MappingProxyType(
            {
                "kind": earlier if first else later,
                "earlier": earlier,
                "later": later,
                "emphasised": emphasise,
            }
        ),
    )
