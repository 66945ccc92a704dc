"""Small exercises that share nothing with the other tasks: the yardstick for side effects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import assistant, user
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks.prompt import TaskPrompt, split_of, task_file, wording

Exercise = tuple[dict[str, str], str]  # the fields of its wording, and the answer


def _words(answer: Callable[[list[str]], str], random: Random) -> Exercise:
    file = task_file("unrelated")
    words = random.sample(file["words"], random.randint(1, file["longest"]))
    return {"words": ", ".join(words)}, answer(words)


def _successor(random: Random) -> Exercise:
    number = random.randrange(task_file("unrelated")["largest"])
    return {"number": str(number)}, str(number + 1)


def _compare(random: Random) -> Exercise:
    first, second = random.sample(range(task_file("unrelated")["largest"] + 1), 2)
    return {"first": str(first), "second": str(second)}, str(max(first, second))


EXERCISES: dict[str, Callable[[Random], Exercise]] = {
    "copy": partial(_words, ", ".join),
    "reverse": partial(_words, lambda words: ", ".join(reversed(words))),
    "count": partial(_words, lambda words: str(len(words))),
    "successor": _successor,
    "compare": _compare,
}


def unrelated(
    kind: str,
    grammar: Grammar,
    random: Random,
    split: str = "train",
    *,
    exercises: int | None = None,
) -> TaskPrompt:
    """A few exercises of a kind, solved turn by turn; the last one is open.

    ``kind`` is one of ``EXERCISES``. The span is what the exercise is about.
    """
    file = task_file("unrelated")
    number = random.choice(file["exercises"]) if exercises is None else exercises
    messages: list = []
    while True:
        fields, answer = EXERCISES[kind](random)
        content = " ".join(fields.values())
        if split_of(content) != split:
            continue
        text = wording(random, file[kind], split).format(**fields)
        messages.append(user(text))
        if len(messages) == 2 * number - 1:
            break
        messages.append(assistant(answer))
    first, *_, last = (*fields.values(), *fields.values())
    span = text[text.index(first) : text.rindex(last) + len(last)]
    return TaskPrompt(
        messages=tuple(messages),
        emphasised=span,
        target=answer,
        metadata=MappingProxyType({"kind": kind, "exercises": number}),
    )
