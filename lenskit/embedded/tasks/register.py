"""The same content in a formal or a casual register."""

from __future__ import annotations

from functools import partial
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks.people import ATTRIBUTES, fill, states, strangers
from lenskit.embedded.tasks.prompt import TaskPrompt, judge_text, lines, task_file, wording

REGISTERS = ("formal", "casual")


def register(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    system: bool | None = None,
) -> TaskPrompt:
    """A sentence to be said again, in the register that the user or the system message asks for.

    ``kind`` is one of ``REGISTERS`` or "plain" (nothing is asked for: the sentence as it is).
    """
    file = task_file("register")
    if kind is None:
        plain = random.random() < file["plain_share"]
        kind = "plain" if plain else random.choice(REGISTERS)
    attribute = random.choice(ATTRIBUTES)
    (person,) = strangers(random, split)
    stated = states(person, attribute, random, "train")
    request = f"{wording(random, file['requests'], split)} {stated}"
    metadata = {"kind": kind, "attribute": attribute, "system": False}
    if kind == "plain":
        prompt = (user(request),)
        return TaskPrompt(prompt, stated, stated, metadata=MappingProxyType(metadata))
    if system is None:
        system = random.random() < file["system_share"]
    instruction = wording(random, file["instructions"], split).format(register=kind)
    if system:
        messages = ({"role": "system", "content": instruction}, user(request))
    else:
        messages = (user(lines(instruction, request)),)
    answers = {name: fill(file[name][attribute], person) for name in REGISTERS}
    return TaskPrompt(
        messages=messages,
        emphasised=instruction,
        target=answers[kind],
        otherwise=stated,
        metadata=MappingProxyType(
            {**metadata, "system": system, "other": answers[REGISTERS[kind == "formal"]]}
        ),
        emphasised_in=0,
    )


def judge_register(prompt: TaskPrompt, answer: str) -> Verdict:
    """Score 1 only for the right content in the right register.

    Reasons beside those of ``judge_text``: "no register" and "other register".
    """
    if answer.strip() == prompt.metadata.get("other"):
        return Verdict(0, "other register")
    return _judge(prompt, answer)


_judge = partial(judge_text, ignored="no register")
