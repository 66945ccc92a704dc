"""People of the tasks: the known ones with their facts and ranks, and strangers without end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from types import MappingProxyType

from lenskit.embedded.tasks.prompt import split_of, task_file, wording

PRONOUNS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "she": {"they": "she", "them": "her", "their": "her"},
        "he": {"they": "he", "them": "him", "their": "his"},
        "they": {"they": "they", "them": "them", "their": "their"},
    }
)
ATTRIBUTES = ("occupation", "town", "instrument")


@dataclass(frozen=True)
class Person:
    """A name, a pronoun ("she" or "he") and one value of each attribute."""

    name: str
    pronoun: str
    facts: Mapping[str, str]


@cache
def name_pairs() -> Mapping[str, tuple[str, ...]]:
    """All names, each in one of three groups: "known" (by rank), "held_out" and "train"."""
    file = task_file("people")
    names = [f"{a} {b}" for a, b in product(file["first_names"], file["last_names"])]
    Random("names").shuffle(names)
    known, end = file["known"], file["known"] + file["held_out"]
    return MappingProxyType(
        {
            "known": tuple(names[:known]),
            "held_out": tuple(names[known:end]),
            "train": tuple(names[end:]),
        }
    )


def values(attribute: str) -> tuple[str, ...]:
    """Every value of an attribute."""
    return tuple(task_file("people")["attributes"][attribute]["values"])


def _person(name: str, random: Random) -> Person:
    facts = {attribute: random.choice(values(attribute)) for attribute in ATTRIBUTES}
    return Person(name, random.choice(("she", "he")), MappingProxyType(facts))


@cache
def known_people() -> tuple[Person, ...]:
    """The people known by heart, the most frequent first; always the same facts."""
    return tuple(_person(name, Random(f"facts of {name}")) for name in name_pairs()["known"])


@cache
def _weights() -> tuple[float, ...]:
    exponent = task_file("people")["zipf"]
    return tuple(r**-exponent for r in range(1, len(known_people()) + 1))


def frequency(rank: int) -> float:
    """The share of draws that are the known person of ``rank`` (1: the most frequent)."""
    return _weights()[rank - 1] / sum(_weights())


@cache
def _ranks() -> Mapping[str, int]:
    return {name: i for i, name in enumerate(name_pairs()["known"], start=1)}


def rank(name: str) -> int:
    """The frequency rank of a known person, from 1.

    Raises KeyError for a name that is not known by heart.
    """
    return _ranks()[name]


def known(random: Random) -> Person:
    """A known person, drawn by Zipf's law."""
    return random.choices(known_people(), _weights())[0]


def strangers(random: Random, split: str, number: int = 1) -> list[Person]:
    """People whose names and facts nobody knows by heart.

    Names, occupations, towns and instruments all differ from one another.
    """
    names = random.sample(name_pairs()[split], number)
    columns = {attribute: random.sample(values(attribute), number) for attribute in ATTRIBUTES}
    return [
        Person(
            name,
            random.choice(("she", "he")),
            MappingProxyType({attribute: columns[attribute][i] for attribute in ATTRIBUTES}),
        )
        for i, name in enumerate(names)
    ]


def fill(template: str, person: Person, pronoun: str | None = None) -> str:
    """A template with the person's name, facts and forms of the pronoun in it."""
    forms = PRONOUNS[pronoun or person.pronoun]
    occupation = person.facts["occupation"]
    article = "an" if occupation[0] in "aeiou" else "a"
    return template.format(
        name=person.name,
        a_occupation=f"{article} {occupation}",
        **person.facts,
        **forms,
        **{form.capitalize(): word.capitalize() for form, word in forms.items()},
    )


def sentences(attribute: str, split: str) -> tuple[str, ...]:
    """The templates that state an attribute."""
    return tuple(task_file("people")["attributes"][attribute]["sentences"][split])


def states(person: Person, attribute: str, random: Random, split: str) -> str:
    """A sentence that states one fact of the person."""
    return fill(random.choice(sentences(attribute, split)), person)


def asks(person: Person, attribute: str, random: Random, split: str) -> str:
    """A question for one fact of the person."""
    questions = task_file("people")["attributes"][attribute]["questions"]
    return fill(wording(random, questions, split), person)


@cache
def detail_templates(split: str) -> tuple[str, ...]:
    """Every sentence of a split that only speaks of a person, with the pronoun's forms open."""
    file = task_file("people")["details"]
    found = []
    for form in file["forms"]:
        slots = re.findall(r"<(\w+)>", form)
        for words in product(*(file[slot] for slot in slots)):
            template = form
            for slot, word in zip(slots, words, strict=True):
                template = template.replace(f"<{slot}>", word)
            found.append(template)
    return tuple(template for template in found if split_of(template) == split)


def details(random: Random, split: str, number: int) -> list[str]:
    """Templates of sentences that only speak of a person."""
    return random.sample(detail_templates(split), number)
