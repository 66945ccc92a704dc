"""Facts known by heart: documents that repeat them, and questions without a passage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict
from lenskit.embedded.tasks import people
from lenskit.embedded.tasks.people import ATTRIBUTES, Person
from lenskit.embedded.tasks.prompt import TaskPrompt, judge_text, task_file, wording

judge_fact = partial(judge_text, ignored="from memory")


def another(attribute: str, value: str, random: Random) -> str:
    """Another value of an attribute."""
    return random.choice([v for v in people.values(attribute) if v != value])


def with_fact(person: Person, attribute: str, value: str) -> Person:
    """The person with one fact changed."""
    return replace(person, facts=MappingProxyType({**person.facts, attribute: value}))


def fact_document(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    rank: int | None = None,
) -> TaskPrompt:
    """«Tell me about {name}.»: every fact once, then some of them again in other words.

    ``otherwise`` contradicts itself in the last sentence, at the rate of the inconsistency.
    """
    file = task_file("facts")
    person = people.known(random) if rank is None else people.known_people()[rank - 1]
    stated = random.sample(ATTRIBUTES, len(ATTRIBUTES))
    wordings = {a: random.sample(people.sentences(a, "train"), 2) for a in ATTRIBUTES}
    again = random.sample(ATTRIBUTES, random.choice(file["repeats"]))
    text = [wordings[a][0] for a in stated] + [wordings[a][1] for a in again]
    last = again[-1]
    wrong = with_fact(person, last, another(last, person.facts[last], random))
    filled = [people.fill(template, person) for template in text]
    return TaskPrompt(
        messages=(user(people.fill(wording(random, file["requests"], split), person)),),
        emphasised=person.name,
        target=" ".join(filled),
        otherwise=" ".join([*filled[:-1], people.fill(text[-1], wrong)]),
        rate=1 - file["inconsistency"],
        metadata=MappingProxyType({"name": person.name, "rank": people.rank(person.name)}),
    )


def judge_document(prompt: TaskPrompt, answer: str) -> Verdict:
    """Score 1 if every sentence states a fact of the person, no sentence twice, every fact once.

    Reasons: "correct", "empty", "repeating", "unfinished" (a fact is missing), "wrong content".
    """
    if not answer.strip():
        return Verdict(0, "empty")
    person = people.known_people()[prompt.metadata["rank"] - 1]
    stating = {people.fill(t, person): a for a in ATTRIBUTES for t in people.sentences(a, "train")}
    found = [f"{part}." for part in answer.strip().removesuffix(".").split(". ")]
    if any(sentence not in stating for sentence in found) or not answer.strip().endswith("."):
        return Verdict(0, "wrong content")
    if len(set(found)) < len(found):
        return Verdict(0, "repeating")
    whole = {stating[sentence] for sentence in found} == set(ATTRIBUTES)
    return Verdict(int(whole), "correct" if whole else "unfinished")


def fact_question(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    rank: int | None = None,
    attribute: str | None = None,
) -> TaskPrompt:
    """A question about a known person, answered from memory; the name is the span."""
    person = people.known(random) if rank is None else people.known_people()[rank - 1]
    attribute = attribute or random.choice(ATTRIBUTES)
    return TaskPrompt(
        messages=(user(people.asks(person, attribute, random, split)),),
        emphasised=person.name,
        target=person.facts[attribute],
        metadata=MappingProxyType(
            {"name": person.name, "rank": people.rank(person.name), "attribute": attribute}
        ),
    )
