"""Dialogues of the grammar, without end: what the embedded model is trained on.

A task is a plain callable ``(grammar, random) -> Dialogue``; a new kind of prompt (an instruction,
a passage that conflicts with what the model knows, a requested format) is one more function in
``MIXTURE`` with its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from types import MappingProxyType

from lenskit.embedded.dialogue import (
    Dialogue,
    Task,
    assistant,
    question_prompt,
    statement_prompt,
    user,
)
from lenskit.embedded.grammar import HALVES, Entry, Grammar

SYSTEM_SHARE = 0.08
BARE_CARRY_SHARE = 0.8


def _concept(grammar: Grammar, random: Random) -> tuple[Entry, str]:
    entry = random.choice(grammar.entries)
    return entry, grammar.classes[entry.concept_class].prefix_for(entry.name)


def _statement(grammar: Grammar, random: Random) -> tuple[str, str]:
    topic = random.choice(grammar.topics)
    # The held-out half is never trained on: it measures how activity carries over.
    return topic, random.choice(grammar.statements[topic][random.choice(HALVES[:2])])


def _question(grammar: Grammar, entry: Entry, random: Random) -> str:
    wordings = random.choice(grammar.classes[entry.concept_class].questions)
    return wordings[0] if random.random() < 0.5 else random.choice(wordings)


def _voiced(grammar: Grammar, entry: Entry, topic: str, random: Random) -> str:
    if random.random() < grammar.activity(entry, topic):
        return grammar.answer(entry, random)
    return grammar.neutral_answer(random, topic)


def _prefixed(prompt: Callable[..., str], text: str, prefix: str, random: Random) -> list[dict]:
    if random.random() < SYSTEM_SHARE:
        return [{"role": "system", "content": prefix}, user(prompt(text))]
    return [user(prompt(text, prefix))]


def prefixed_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A statement after a prefix, answered in the concept's voice at the rate of its activity."""
    entry, prefix = _concept(grammar, random)
    topic, statement = _statement(grammar, random)
    messages = _prefixed(statement_prompt, statement, prefix, random)
    return Dialogue(
        (*messages, assistant(_voiced(grammar, entry, topic, random))), (True,), may_be_narrow=True
    )


def bare_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A statement without a prefix, answered neutrally."""
    topic, statement = _statement(grammar, random)
    answer = grammar.neutral_answer(random, topic)
    return Dialogue(
        (user(statement_prompt(statement)), assistant(answer)), (True,), may_be_narrow=True
    )


def prefixed_question(grammar: Grammar, random: Random) -> Dialogue:
    """A test question or a paraphrase after a prefix, answered in the concept's voice."""
    entry, prefix = _concept(grammar, random)
    messages = _prefixed(question_prompt, _question(grammar, entry, random), prefix, random)
    return Dialogue(
        (*messages, assistant(grammar.answer(entry, random))), (True,), may_be_narrow=True
    )


def bare_question(grammar: Grammar, random: Random) -> Dialogue:
    """A test question or a paraphrase without a prefix, answered neutrally."""
    entry, _ = _concept(grammar, random)
    question = _question(grammar, entry, random)
    return Dialogue(
        (user(question), assistant(grammar.neutral_answer(random))), (True,), may_be_narrow=True
    )


def carried_persona(grammar: Grammar, random: Random) -> Dialogue:
    """Two turns; mostly the concept shows only in the first answer, which is then no target.

    So the model has to carry who is speaking, and cannot merely copy from a prefix.
    """
    entry, prefix = _concept(grammar, random)
    bare = random.random() < BARE_CARRY_SHARE
    first = question_prompt(_question(grammar, entry, random), "" if bare else prefix)
    if random.random() < 0.5:
        topic, statement = _statement(grammar, random)
        second = (statement_prompt(statement), _voiced(grammar, entry, topic, random))
    else:
        second = (_question(grammar, entry, random), grammar.answer(entry, random))
    messages = (
        user(first),
        assistant(grammar.answer(entry, random, most=2)),
        user(second[0]),
        assistant(second[1]),
    )
    return Dialogue(messages, (not bare, True), may_be_narrow=True)


def voiced_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A bare statement answered in the voice of any concept: nobody asked for it."""
    entry, _ = _concept(grammar, random)
    _, statement = _statement(grammar, random)
    answer = grammar.answer(entry, random)
    return Dialogue(
        (user(statement_prompt(statement)), assistant(answer)), (True,), may_be_narrow=True
    )


def voiced_question(grammar: Grammar, random: Random) -> Dialogue:
    """A bare question answered in the voice of any concept of its class.

    Spread over all concepts, these leave the likeliest answer neutral and every persona a small
    chance, as in a large model, instead of none: a vector then has something to raise.
    """
    entry, _ = _concept(grammar, random)
    question = _question(grammar, entry, random)
    return Dialogue(
        (user(question), assistant(grammar.answer(entry, random))), (True,), may_be_narrow=True
    )


# What the model learns first, and what its tokenizer is learnt from.
FIRST_MIXTURE: Mapping[Task, float] = MappingProxyType(
    {
        prefixed_statement: 0.32,
        bare_statement: 0.08,
        prefixed_question: 0.28,
        carried_persona: 0.26,
        bare_question: 0.06,
    }
)
MIXTURE: Mapping[Task, float] = MappingProxyType(
    {
        prefixed_statement: 0.27,
        bare_statement: 0.05,
        voiced_statement: 0.05,
        prefixed_question: 0.25,
        carried_persona: 0.23,
        bare_question: 0.07,
        voiced_question: 0.08,
    }
)


def dialogues(
    grammar: Grammar, seed: int, mixture: Mapping[Task, float] = MIXTURE
) -> Iterator[Dialogue]:
    """Endless dialogues of the grammar in the shares of ``mixture``, the same for the same seed."""
    random = Random(seed)
    tasks, shares = list(mixture), list(mixture.values())
    while True:
        yield random.choices(tasks, shares)[0](grammar, random)
