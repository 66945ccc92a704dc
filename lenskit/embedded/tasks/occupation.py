"""The occupation of a person from the first sentence of a biography, near or far."""

from __future__ import annotations

from functools import partial
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks.fillers import filler
from lenskit.embedded.tasks.people import details, fill, states, strangers
from lenskit.embedded.tasks.prompt import TaskPrompt, judge_text, task_file, wording

judge_occupation = partial(judge_text, ignored="occupation of another")


def occupation(
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    kind: str | None = None,
    length: tuple[int, int] | None = None,
    mark: str = "{text}",
    asked: bool = True,
) -> TaskPrompt:
    """«{name} has the occupation of»: the first sentence says it, later ones speak of others.

    Where the first sentence is far, the occupation that was named last takes its place at the
    filler's rate. ``kind`` and ``asked`` have no meaning here.
    """
    between = filler(grammar, random, split, length)
    number = random.choice(task_file("occupation")["distractors"])
    # Across filler the failure is another person's occupation, so there has to be one.
    person, *others = strangers(random, split, 1 + max(number, int(between.length > 0)))
    first = mark.format(text=states(person, "occupation", random, split))
    middle = [
        fill(details(random, split, 1)[0], person),
        states(person, random.choice(("town", "instrument")), random, split),
    ]
    text = " ".join(
        (
            first,
            *middle[: random.choice((1, 2))],
            *([between.text] if between.text else []),
            *(states(other, "occupation", random, split) for other in others),
        )
    )
    question = fill(wording(random, task_file("occupation")["questions"], split), person)
    return TaskPrompt(
        messages=(user(f"{text}\n\n{question}"),),
        emphasised=first,
        target=person.facts["occupation"],
        otherwise=others[-1].facts["occupation"] if others else "",
        rate=between.rate,
        metadata=MappingProxyType(
            {
                "family": "occupation",
                "kind": "occupation",
                "length": between.length,
                "topic": between.topic,
            }
        ),
    )
