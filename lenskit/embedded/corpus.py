"""The mixtures of dialogues that the embedded model is trained on, and dialogues without end.

A task is a plain callable ``(grammar, random) -> Dialogue``; further ones join a mixture with
``extended``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import Dialogue, Task
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.tasks import task_shares
from lenskit.embedded.voices import (
    account,
    bare_question,
    bare_statement,
    carried_persona,
    competing_question,
    competing_statement,
    neutral_prefix,
    prefixed_question,
    prefixed_statement,
    voiced_question,
    voiced_statement,
)


def extended(
    mixture: Mapping[Task, float], further: Mapping[Task, float], share: float
) -> Mapping[Task, float]:
    """``mixture`` with ``share`` of all dialogues given to ``further`` tasks, by their weights.

    The shares of the result sum to 1. Raises ValueError for a share outside 0 to 1, and for a task
    that is in both.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share}")
    if both := [task.__name__ for task in further if task in mixture]:
        raise ValueError(f"{both} are in the mixture already; give each task one share")
    parts = ((mixture, 1 - share), (further, share))
    return MappingProxyType(
        {
            task: weight * whole / sum(part.values())
            for part, whole in parts
            for task, weight in part.items()
        }
    )


# What the model learns first, and what its tokenizer is learnt from: who is asked for and who of
# them is active, and no voice that nobody asked for. Mostly one prefix a prompt: which concept it
# is, out of 512, is learnt from these, and only then which of several it is.
FIRST_VOICES: Mapping[Task, float] = MappingProxyType(
    {
        prefixed_statement: 0.16,
        competing_statement: 0.14,
        bare_statement: 0.04,
        prefixed_question: 0.26,
        account: 0.14,
        competing_question: 0.08,
        bare_question: 0.04,
        neutral_prefix: 0.05,
        carried_persona: 0.09,
    }
)
# Competition is the largest part: it is what makes attention follow activity, what speaks in pairs
# and what is neutral in spite of prefixes. Voices that nobody asked for stay fewer than the bare
# and neutral prompts of their kind, so that the likeliest unasked answer is neutral.
VOICES: Mapping[Task, float] = MappingProxyType(
    {
        prefixed_statement: 0.12,
        competing_statement: 0.24,
        bare_statement: 0.05,
        voiced_statement: 0.05,
        prefixed_question: 0.11,
        account: 0.05,
        competing_question: 0.09,
        bare_question: 0.05,
        voiced_question: 0.05,
        neutral_prefix: 0.05,
        carried_persona: 0.14,
    }
)


# The tasks of attention steering take these shares of the mixtures. Concepts keep the larger part:
# there are 512 of them to learn.
FIRST_TASK_SHARE, TASK_SHARE = 0.16, 0.32
FIRST_MIXTURE = extended(FIRST_VOICES, task_shares(), FIRST_TASK_SHARE)
MIXTURE = extended(VOICES, task_shares(), TASK_SHARE)


def dialogues(
    grammar: Grammar, seed: int, mixture: Mapping[Task, float] = MIXTURE
) -> Iterator[Dialogue]:
    """Endless dialogues of the grammar in the shares of ``mixture``, the same for the same seed."""
    random = Random(seed)
    tasks, shares = list(mixture), list(mixture.values())
    while True:
        yield random.choices(tasks, shares)[0](grammar, random)
