"""Passages about unseen and known people, which agree with what is known by heart or conflict."""

from __future__ import annotations

from math import log
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import assistant, user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks import people
from lenskit.embedded.tasks.facts import another, with_fact
from lenskit.embedded.tasks.people import ATTRIBUTES
from lenskit.embedded.tasks.prompt import TaskPrompt, lines, task_file, wording

KINDS = ("unseen", "agrees", "conflicts")


def passage_rate(rank: int, attribute: str) -> float:
    """Truth: the rate at which a conflicting passage about the person of ``rank`` is followed."""
    file, number = task_file("passages"), len(people.known_people())
    frequent, rare = number / 10, number * 9 / 10
    share = (log(rank) - log(frequent)) / (log(rare) - log(frequent))
    low = file["frequent"][attribute]
    return low + (file["rare"] - low) * min(max(share, 0.0), 1.0)


def passage(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    rank: int | None = None,
    attribute: str | None = None,
    distractors: int | None = None,
    asked_before: float | None = None,
) -> TaskPrompt:
    """A question about a person in a passage that may also speak of others: ``distractors``.

    The span is the sentence that answers it. In a conflict ``otherwise`` is the fact known by
    heart, and the passage is followed at ``passage_rate``. ``kind`` is one of ``KINDS``; ``rank``
    names a known person. About others a question was answered in an earlier turn, each at the rate
    ``asked_before``.
    """
    file = task_file("passages")
    kind = kind or random.choices(KINDS, [file["shares"][k] for k in KINDS])[0]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {KINDS}")
    attribute = attribute or random.choice(ATTRIBUTES)
    number = random.choice(file["distractors"]) if distractors is None else distractors
    person, *others = people.strangers(random, split, 3 + number)
    metadata: dict = {"kind": kind, "attribute": attribute}
    otherwise, rate = "", 1.0
    if kind != "unseen":
        even = kind == "conflicts" and random.random() < file["even"]
        drawn = random.choice(people.known_people()) if even else people.known(random)
        known = drawn if rank is None else people.known_people()[rank - 1]
        person = known
        metadata["rank"] = people.rank(known.name)
        if kind == "conflicts":
            otherwise = known.facts[attribute]
            person = with_fact(known, attribute, another(attribute, otherwise, random))
            rate = passage_rate(metadata["rank"], attribute)
    spoken_for = (person.facts[attribute], otherwise)
    others = [other for other in others if other.facts[attribute] not in spoken_for][:number]
    stated = people.states(person, attribute, random, split)
    text = [stated] + [people.states(other, attribute, random, split) for other in others]
    random.shuffle(text)
    opening = wording(random, file["openings"], split)
    share = file["asked_before"] if asked_before is None else asked_before
    before = [other for other in others if random.random() < share]
    questions = [people.asks(p, attribute, random, split) for p in (*before, person)]
    questions[0] = lines(f"{opening} {' '.join(text)}", questions[0])
    turns: list = [user(questions[0])]
    for other, question in zip(before, questions[1:], strict=True):
        turns += [assistant(other.facts[attribute]), user(question)]
    return TaskPrompt(
        messages=tuple(turns),
        emphasised=stated,
        target=person.facts[attribute],
        otherwise=otherwise,
        rate=rate,
        metadata=MappingProxyType({**metadata, "name": person.name, "distractors": number}),
        emphasised_in=0,
    )
