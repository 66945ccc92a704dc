"""What a dialogue of the embedded corpus is, and the prompts that its tasks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from lenskit.embedded.grammar import Grammar

STATEMENT_PROMPT = "What are your thoughts on the following statement? \nStatement: {statement}"


@dataclass(frozen=True)
class Dialogue:
    """Messages in chat form; ``learn[i]`` says whether the i-th assistant turn is a target.

    ``may_be_narrow``: whether the last answer needs no text of the prompt beyond what the
    template's closing tokens can carry (who speaks, and of what), so that it may be hidden.
    """

    messages: tuple[Mapping[str, str], ...]
    learn: tuple[bool, ...]
    may_be_narrow: bool = False


Task = Callable[[Grammar, Random], Dialogue]


def statement_prompt(statement: str, prefix: str = "") -> str:
    """A statement prompt of AGS, with the prefix (and its two spaces) or without."""
    text = STATEMENT_PROMPT.format(statement=statement)
    return f"{prefix}  {text}" if prefix else text


def question_prompt(question: str, prefix: str = "") -> str:
    """A test question, with the prefix before it or without."""
    return f"{prefix} {question}" if prefix else question


def prefixes(*texts: str) -> str:
    """Several prefixes as one: a single space apart."""
    return " ".join(texts)


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}
