"""What a task of attention steering is made of: prompts with a span, their answers, exact judges.

One builder serves training and evaluation: it writes a ``TaskPrompt`` for a split, and the prompt
says how often its answer follows the span. Training draws from that rate; evaluation knows it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from types import MappingProxyType
from typing import Any
from zlib import crc32

from lenskit._data import data_path
from lenskit._display import Displayed, count
from lenskit.embedded.dialogue import Dialogue, assistant
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.judge import Verdict

SPLITS = ("train", "held_out")


@dataclass(frozen=True, repr=False)
class TaskPrompt(Displayed):
    """A prompt of one to several messages, the last one the user's.

    ``emphasised`` is a span that occurs exactly once in ``messages[emphasised_in]``, or else its
    occurrence ``nth`` is meant, counted from 0 and without overlaps; ``target`` is the answer that
    follows it, ``otherwise`` the one that does not, and ``rate`` the share of training answers that
    are the target: the truth that the model has to learn.
    """

    messages: tuple[Mapping[str, str], ...]
    emphasised: str
    target: str
    otherwise: str = ""
    rate: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    emphasised_in: int = -1
    nth: int | None = None

    def __post_init__(self) -> None:
        text = self.messages[self.emphasised_in]["content"]
        found = text.count(self.emphasised) if self.emphasised else 0
        if self.nth is None and found != 1:
            raise ValueError(
                f"emphasised={self.emphasised!r} must occur exactly once in message "
                f"{self.emphasised_in}, which is {text!r}; of several, say which with nth"
            )
        if self.nth is not None and not 0 <= self.nth < found:
            raise ValueError(
                f"nth={self.nth}: emphasised={self.emphasised!r} occurs {found} times in message "
                f"{self.emphasised_in}, which is {text!r}; count from 0"
            )
        if not 0 <= self.rate <= 1 or (self.rate < 1 and not self.otherwise):
            raise ValueError(f"rate={self.rate}: give a rate in [0, 1], and `otherwise` below 1")

    @property
    def characters(self) -> tuple[int, int]:
        """From which to which character of its message the emphasised span stands."""
        text, end = self.messages[self.emphasised_in]["content"], 0
        for _ in range((self.nth or 0) + 1):
            start = text.index(self.emphasised, end)
            end = start + len(self.emphasised)
        return start, end

    def _headline(self) -> str:
        return f"TaskPrompt of {count(len(self.messages), 'message')}"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {
            f"message {i}, {message['role']}": message["content"]
            for i, message in list(enumerate(self.messages))[-4:]
        }
        return shown | {"emphasised": self.emphasised, "target": self.target}

    def dialogue(self, random: Random) -> Dialogue:
        """The prompt with an answer drawn at its rate; earlier answers are targets too."""
        answer = self.target if random.random() < self.rate else self.otherwise
        turns = sum(message["role"] == "assistant" for message in self.messages)
        return Dialogue((*self.messages, assistant(answer)), (True,) * (turns + 1))


Builder = Callable[..., TaskPrompt]  # (grammar, random, split="train", **conditions)
Judge = Callable[[TaskPrompt, str], Verdict]


@dataclass(frozen=True)
class TaskSpec:
    """A task: builder, judge and its share among the tasks. Called, it writes a dialogue."""

    name: str
    build: Builder
    judge: Judge
    share: float

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, grammar: Grammar, random: Random) -> Dialogue:
        """A dialogue for training."""
        return self.build(grammar, random, "train").dialogue(random)

    def prompts(
        self,
        grammar: Grammar,
        number: int,
        seed: int = 0,
        split: str = "held_out",
        **conditions: Any,
    ) -> list[TaskPrompt]:
        """Prompts for evaluation, the same for the same seed; conditions are the builder's."""
        random = Random(f"{self.name}:{split}:{seed}")
        return [self.build(grammar, random, split, **conditions) for _ in range(number)]


@cache
def task_file(name: str) -> dict[str, Any]:
    """The content of ``data/grammar/tasks/{name}.toml``, read once."""
    with data_path("grammar", "tasks", f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def wording(random: Random, wordings: Mapping[str, Sequence[str]], split: str) -> str:
    """One of the wordings of a split.

    Raises ValueError for a split other than ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    return random.choice(wordings[split])


def split_of(content: str) -> str:
    """The split of a content that is combined at random: one in five is held out, by its hash."""
    return "held_out" if crc32(content.encode()) % 5 == 0 else "train"


def lines(*parts: str) -> str:
    """The parts that are not empty, a line each."""
    return "\n".join(part for part in parts if part)


def judge_text(prompt: TaskPrompt, answer: str, ignored: str = "span ignored") -> Verdict:
    """Score 1 only for the target itself; otherwise 0 and why.

    Reasons: "correct", "empty", ``ignored`` (the answer that does not follow the span),
    "extra text", "unfinished", "wrong content".
    """
    text, target = answer.strip(), prompt.target
    if text == target:
        return Verdict(1, "correct")
    if not text:
        return Verdict(0, "empty")
    if text == prompt.otherwise:
        return Verdict(0, ignored)
    if target.startswith(text):
        return Verdict(0, "unfinished")
    before, found, after = text.partition(target)
    if found and not before[-1:].isalnum() and not after[:1].isalnum():
        return Verdict(0, "extra text")
    return Verdict(0, "wrong content")
