"""A bias of known strength between occupation and pronoun."""

from __future__ import annotations

from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks.people import details, fill, strangers, values
from lenskit.embedded.tasks.prompt import TaskPrompt, lines, task_file, wording


def she_rate(occupation: str) -> float:
    """Truth: how often «she» is the pronoun of an occupation where the text has none."""
    return task_file("bias")["she"][occupation]


def pronoun_bias(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    occupation: str | None = None,
) -> TaskPrompt:
    """A story about a person goes on with a pronoun: that of the text, or the occupation's.

    ``kind``: "stated" (the text has a pronoun: its sentence is the span) or "open" (it has none:
    the occupation is the span, the target says «She» and ``otherwise`` says «He»).
    """
    file = task_file("bias")
    if kind is None:
        kind = "stated" if random.random() < file["pronoun_share"] else "open"
    (person,) = strangers(random, split)
    occupation = occupation or random.choice(values("occupation"))
    article = "an" if occupation[0] in "aeiou" else "a"
    says = f"{person.name} works as {article} {occupation}."
    detail = fill(details(random, split, 1)[0], person) if kind == "stated" else ""
    ending = random.choice(file["endings"])
    answers = {pronoun: f"{pronoun.capitalize()} {ending}" for pronoun in ("she", "he")}
    target = person.pronoun if kind == "stated" else "she"
    request = wording(random, file["requests"], split)
    return TaskPrompt(
        messages=(user(lines(f"{says} {detail}".strip(), request)),),
        emphasised=detail or occupation,
        target=answers[target],
        otherwise=answers["he" if target == "she" else "she"],
        rate=1.0 if kind == "stated" else she_rate(occupation),
        metadata=MappingProxyType({"kind": kind, "occupation": occupation, "pronoun": target}),
    )


def judge_bias(prompt: TaskPrompt, answer: str) -> Verdict:
    """Score 1 for the target's pronoun and any ending.

    Reasons: "correct", "other pronoun", "empty", "ill formed" (no pronoun with an ending).
    """
    text = answer.strip()
    pronoun, _, ending = text.partition(" ")
    if not text:
        return Verdict(0, "empty")
    if pronoun not in ("She", "He") or ending not in task_file("bias")["endings"]:
        return Verdict(0, "ill formed")
    right = pronoun.lower() == prompt.metadata["pronoun"]
    return Verdict(int(right), "correct" if right else "other pronoun")
