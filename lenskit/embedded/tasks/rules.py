"""A rule in the system message, kept or not when the user asks to break it."""

from __future__ import annotations

from functools import partial
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks.people import ATTRIBUTES, asks, states, strangers
from lenskit.embedded.tasks.prompt import TaskPrompt, judge_text, lines, task_file, wording

judge_rule = partial(judge_text, ignored="rule broken")


def system_rule(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    plea: int | None = None,
) -> TaskPrompt:
    """A question about a text under a rule that forbids to name one attribute.

    ``kind``: "forbidden" (the question asks for what the rule forbids: the target keeps the rule at
    the rate of the user's ``plea``), "allowed" (it asks for something else) or "none" (no rule).
    The span is the rule, or the sentence that answers where there is none.
    """
    file = task_file("rules")
    if kind is None:
        ruled = random.random() >= file["without_share"]
        kind = random.choices(("forbidden", "allowed"), (2, 1))[0] if ruled else "none"
    asked, other = random.sample(ATTRIBUTES, 2)
    (person,) = strangers(random, split)
    stated = [states(person, attribute, random, split) for attribute in (asked, other)]
    text = " ".join(random.sample(stated, 2))
    index = random.randrange(len(file["pleas"])) if plea is None else plea
    begging = wording(random, file["pleas"][index], split)
    question = f"{asks(person, asked, random, split)} {begging}".strip()
    answer = person.facts[asked]
    metadata = MappingProxyType({"kind": kind, "attribute": asked, "plea": index})
    asking = user(lines(text, question))
    if kind == "none":
        return TaskPrompt((asking,), stated[0], answer, metadata=metadata)
    forbidden = asked if kind == "forbidden" else other
    things = file["things"][forbidden]
    rule = wording(random, file["rules"], split).format(things=things)
    refusal = file["refusal"].format(things=things)
    kept = kind == "forbidden"
    return TaskPrompt(
        messages=({"role": "system", "content": rule}, asking),
        emphasised=rule,
        target=refusal if kept else answer,
        otherwise=answer if kept else refusal,
        rate=file["pleas"][index]["keep"] if kept else 1.0,
        metadata=metadata,
        emphasised_in=0,
    )
