"""Filler text of known length, and how often an instruction is still followed across it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks.prompt import task_file

TRAINED_HALVES = ("first", "second")


@dataclass(frozen=True)
class Filler:
    """Statements of one topic, ``length`` tokens (estimated), followed across at ``rate``."""

    text: str
    topic: str
    length: int
    rate: float


def token_estimate(text: str) -> int:
    """About how many tokens a text has: words and punctuation marks times a constant."""
    return round(len(re.findall(r"\w+|[^\w\s]", text)) * task_file("fillers")["tokens_a_word"])


def follow_rate(length: float, topic: str) -> float:
    """Truth: the rate at which an instruction is followed across ``length`` tokens of a topic."""
    file = task_file("fillers")
    ramp = (length - file["near"]) / (file["far"] - file["near"])
    return 1 - (1 - file["floor"][topic]) * min(max(ramp, 0.0), 1.0)


def raised(rate: float, failures: float) -> float:
    """A rate of following of which only a part of the failures is left."""
    return 1 - (1 - rate) * failures


def draw_length(random: Random, file: str = "fillers") -> tuple[int, int]:
    """A range of lengths, drawn as in training."""
    low, high = random.choices(task_file(file)["lengths"], task_file(file)["shares"])[0]
    return low, high


def filler(
    grammar: Grammar, random: Random, split: str, length: tuple[int, int] | None = None
) -> Filler:
    """Filler of a topic, from ``length[0]`` to about ``length[1]`` tokens; (0, 0) is none.

    Held-out fillers begin with held-out statements; trained ones follow where these do not suffice.
    Raises ValueError where the topic's statements are too few for the length.
    """
    low, high = draw_length(random) if length is None else length
    topic = random.choice(grammar.topics)
    if high == 0:
        return Filler("", topic, 0, 1.0)
    parts = grammar.statements[topic]
    trained = [s for half in TRAINED_HALVES for s in parts[half]]
    random.shuffle(trained)
    statements = trained
    if split == "held_out":
        statements = random.sample(parts["held_out"], len(parts["held_out"])) + trained
    # The last statement runs over the length that is wanted by half a statement on average.
    wanted = random.uniform(low, max(low, high - 12))
    text = ""
    for statement in statements:
        text = f"{text} {statement}".lstrip()
        if (tokens := token_estimate(text)) >= wanted:
            return Filler(text, topic, tokens, follow_rate(tokens, topic))
    raise ValueError(f"length={length}: the statements of {topic!r} have {tokens} tokens in all")
