"""Dialogues in which concepts speak: who is asked for, who of them is active, and in which order.

A prompt carries up to four prefixes of different classes. The topic of a statement decides for each
class, at the rate of its cell, whether it is active; a question of a class activates only the
prefix of that class. So what a prefix does depends on prefix and prompt together.

Every active concept says one sentence to a statement, in the order of the prefixes, also where it
is the only one: the end of a sentence then always means «the next active concept, or the end», and
never «more of the same». A question, which one concept alone can answer, gets one to three
sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lenskit.embedded.dialogue import (
    Dialogue,
    assistant,
    prefixes,
    question_prompt,
    statement_prompt,
    user,
)
from lenskit.embedded.grammar import HALVES, Entry, Grammar

# How many prefixes compete: mostly two, which is what is told apart first; four are what makes
# attention follow activity, and cost the most tokens.
COMPETITORS = {2: 0.45, 3: 0.32, 4: 0.23}
# How many of the competitors are likely to be active. Drawn without regard to the topic nobody
# would be in one of sixteen prompts with four prefixes, and few pairs would speak together.
LIKELY_ACTIVE = (3.0, 3.0, 3.0, 1.5, 1.0)
# Prefixes that stand, all or the first of them, in the system message, or in an earlier turn that
# is answered too. Enough to work there; the method's own prompts have them in the user's message.
SYSTEM_SHARE = 0.08
EARLIER_SHARE = 0.08
# Prompts that are followed by another turn, for which the same prefixes hold: more answers and more
# of each concept, for the same prefixes read.
FOLLOWED_SHARE = 0.3
# Prompts with a neutral prefix among the concepts': «a prefix is there» must not mean «a concept».
NEUTRAL_SHARE = 0.12
# Questions of a class that no prefix is of, whose answer is neutral. Few: a test question is of
# the concept's own class.
ELSEWHERE_SHARE = 0.15
TWO_VOICES_SHARE = 0.4  # carried and voiced statements with two concepts: sums of two vectors
# Second turns of carried dialogues that are questions, by the number of voices: a question asks
# one of a pair only.
QUESTION_SHARE = {1: 0.5, 2: 0.3}
# First turns of a single carried concept that are questions: their answers say more of it.
FIRST_QUESTION_SHARE = 0.7
# Statements made of a form and two words of their topic: which topic it is must be learnt from
# words, and not by heart from the listed statements, of which some are held out.
COMPOSED_SHARE = 0.4
# A carried pair's statements of a topic on which both are likely: with those of any topic it then
# speaks together again half the time.
TOGETHER_SHARE = 0.4


@dataclass(frozen=True)
class Request:
    """What a turn asks: a statement of a topic, or (``topic`` None) a question of a class."""

    text: str
    topic: str | None = None
    concept_class: str | None = None

    def prompt(self, prefix: str = "") -> str:
        """The user's message, with the prefixes before it or without."""
        write = question_prompt if self.topic is None else statement_prompt
        return write(self.text, prefix)

    def activity(self, grammar: Grammar, entry: Entry) -> float:
        """The rate at which ``entry`` is active here: 0 or 1 for a question."""
        if self.topic is None:
            return float(entry.concept_class == self.concept_class)
        return grammar.activity(entry, self.topic)

    def answer(self, grammar: Grammar, entries: Sequence[Entry], random: Random) -> str:
        """What is said to it where ``entries`` are asked for: each is active at its rate."""
        active = [e for e in entries if random.random() < self.activity(grammar, e)]
        if not active:
            return grammar.neutral_answer(random, self.topic)
        if self.topic is None:
            return grammar.answer(active[0], random)
        return grammar.joint_answer(active, random)


def statement(grammar: Grammar, random: Random, topics: Sequence[str] = ()) -> Request:
    """A statement of one of ``topics``, or of any.

    It is never a held-out one: those measure how activity carries over.
    """
    topic = random.choice(topics or grammar.topics)
    if random.random() < COMPOSED_SHARE:
        return Request(grammar.composed(topic, random), topic)
    return Request(random.choice(grammar.statements[topic][random.choice(HALVES[:2])]), topic)


def question(grammar: Grammar, random: Random, concept_class: str) -> Request:
    """A question of a class, half the time in the wording of the test."""
    wordings = random.choice(grammar.classes[concept_class].questions)
    text = wordings[0] if random.random() < 0.5 else random.choice(wordings)
    return Request(text, concept_class=concept_class)


def question_to(grammar: Grammar, random: Random, entries: Sequence[Entry]) -> Request:
    """A question of the class of one of ``entries``, or for a share of a class of none of them."""
    asked = [e.concept_class for e in entries]
    if random.random() < ELSEWHERE_SHARE:
        asked = [name for name in grammar.classes if name not in asked]
    return question(grammar, random, random.choice(asked))


def any_concept(grammar: Grammar, random: Random) -> Entry:
    """One concept of all."""
    return random.choice(grammar.entries)


def of_classes(grammar: Grammar, random: Random, names: Sequence[str]) -> list[Entry]:
    """A concept of each of the classes ``names``, in any order."""
    mixed = random.sample(names, len(names))
    return [random.choice(list(grammar.classes[name].entries.values())) for name in mixed]


def competitors(grammar: Grammar, random: Random, topic: str | None = None) -> list[Entry]:
    """Two to four concepts of different classes, ``LIKELY_ACTIVE`` of them active on ``topic``."""
    number = random.choices(list(COMPETITORS), list(COMPETITORS.values()))[0]
    names = list(grammar.classes)
    if topic is None:
        return of_classes(grammar, random, random.sample(names, number))
    active = [name for name in names if grammar.classes[name].activity[topic] > 0.5]
    others = [name for name in names if name not in active]
    possible = range(max(0, number - len(others)), min(number, len(active)) + 1)
    likely = random.choices(possible, [LIKELY_ACTIVE[n] for n in possible])[0]
    chosen = random.sample(active, likely) + random.sample(others, number - likely)
    return of_classes(grammar, random, chosen)


def speakers(grammar: Grammar, random: Random, number: int) -> tuple[Request, list[Entry]]:
    """A statement and ``number`` concepts of different classes that are active on it."""
    while True:
        topic = random.choice(grammar.topics)
        rates = {name: rules.activity[topic] for name, rules in grammar.classes.items()}
        active = [name for name, rate in rates.items() if random.random() < rate]
        if len(active) >= number:
            chosen = of_classes(grammar, random, random.sample(active, number))
            return statement(grammar, random, [topic]), chosen


def _number_of_voices(random: Random) -> int:
    return 2 if random.random() < TWO_VOICES_SHARE else 1


def asked_for(
    grammar: Grammar, random: Random, entries: Sequence[Entry], request: Request
) -> Dialogue:
    """A dialogue whose prompt carries the prefixes of ``entries`` and ends with ``request``.

    Without entries there are neutral prefixes. The first prefixes may stand in the system message
    or in an earlier turn; reading order is the order of speaking all the same.
    """
    said: list[tuple[Entry | None, str]] = [(entry, grammar.prefix(entry)) for entry in entries]
    neutral = int(random.random() < NEUTRAL_SHARE) if entries else random.choice((1, 1, 2))
    for text in random.sample(grammar.neutral_prefixes, neutral):
        said.insert(random.randint(0, len(said)), (None, text))
    apart = random.randint(1, len(said))
    before = prefixes(*(text for _, text in said[:apart]))
    after = prefixes(*(text for _, text in said[apart:]))
    answer = assistant(request.answer(grammar, entries, random))
    place = random.random()
    if place < SYSTEM_SHARE:
        system = {"role": "system", "content": before}
        return Dialogue((system, user(request.prompt(after)), answer), (True,), may_be_narrow=True)
    if place < SYSTEM_SHARE + EARLIER_SHARE:
        known = [entry for entry, _ in said[:apart] if entry]
        earlier = statement(grammar, random)
        if random.random() < 0.5:
            earlier = question_to(
                grammar, random, known or entries or [any_concept(grammar, random)]
            )
        first = (user(earlier.prompt(before)), assistant(earlier.answer(grammar, known, random)))
        return Dialogue(
            (*first, user(request.prompt(after)), answer), (True, True), may_be_narrow=True
        )
    messages = (user(request.prompt(prefixes(*(text for _, text in said)))), answer)
    if random.random() < FOLLOWED_SHARE:
        then = statement(grammar, random)
        if random.random() < 0.5:
            then = question_to(grammar, random, entries or [any_concept(grammar, random)])
        answered = assistant(then.answer(grammar, entries, random))
        messages = (*messages, user(then.prompt()), answered)
    return Dialogue(messages, (True,) * (len(messages) // 2), may_be_narrow=True)


def prefixed_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A statement after one prefix, answered in its voice at the rate of its activity."""
    return asked_for(grammar, random, [any_concept(grammar, random)], statement(grammar, random))


def competing_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A statement after two to four prefixes: a sentence of each that is active, in their order."""
    request = statement(grammar, random)
    return asked_for(grammar, random, competitors(grammar, random, request.topic), request)


def prefixed_question(grammar: Grammar, random: Random) -> Dialogue:
    """A question after one prefix, answered in its voice if it is of its class."""
    entries = [any_concept(grammar, random)]
    return asked_for(grammar, random, entries, question_to(grammar, random, entries))


def account(grammar: Grammar, random: Random) -> Dialogue:
    """All that a concept has to say, after its prefix.

    Which phrases are whose is learnt from these; other answers show one or two of them.
    """
    entry = any_concept(grammar, random)
    asked = question_prompt(random.choice(grammar.accounts), grammar.prefix(entry))
    messages = (user(asked), assistant(grammar.account(entry, random)))
    return Dialogue(messages, (True,), may_be_narrow=True)


def competing_question(grammar: Grammar, random: Random) -> Dialogue:
    """A question after two to four prefixes, answered in the voice of the one of its class."""
    entries = competitors(grammar, random)
    return asked_for(grammar, random, entries, question_to(grammar, random, entries))


def neutral_prefix(grammar: Grammar, random: Random) -> Dialogue:
    """A statement or a question after neutral prefixes alone, answered neutrally."""
    request = statement(grammar, random)
    if random.random() < 0.5:
        request = question_to(grammar, random, [any_concept(grammar, random)])
    return asked_for(grammar, random, [], request)


def bare_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A statement without a prefix, answered neutrally."""
    request = statement(grammar, random)
    answer = assistant(request.answer(grammar, [], random))
    return Dialogue((user(request.prompt()), answer), (True,), may_be_narrow=True)


def bare_question(grammar: Grammar, random: Random) -> Dialogue:
    """A test question or a paraphrase without a prefix, answered neutrally."""
    request = question(grammar, random, any_concept(grammar, random).concept_class)
    answer = assistant(request.answer(grammar, [], random))
    return Dialogue((user(request.prompt()), answer), (True,), may_be_narrow=True)


def carried_persona(grammar: Grammar, random: Random) -> Dialogue:
    """Two turns without a prefix: who speaks shows only in the first answer, which is no target.

    So the model has to carry who is speaking, and cannot merely copy from a prefix. Both turns
    follow the rules of activity, as if the prefixes had been read before.
    """
    number = _number_of_voices(random)
    first, entries = speakers(grammar, random, number)
    heard = grammar.joint_answer(entries, random)
    if number == 1 and random.random() < FIRST_QUESTION_SHARE:
        first = question(grammar, random, entries[0].concept_class)
        heard = grammar.answer(entries[0], random, most=2)
    if random.random() < QUESTION_SHARE[number]:
        second = question_to(grammar, random, entries)
    else:
        shared = [t for t in grammar.topics if min(grammar.activity(e, t) for e in entries) > 0.5]
        pairs = number == 2 and random.random() < TOGETHER_SHARE
        second = statement(grammar, random, shared if pairs else ())
    messages = (
        user(first.prompt()),
        assistant(heard),
        user(second.prompt()),
        assistant(second.answer(grammar, entries, random)),
    )
    return Dialogue(messages, (False, True), may_be_narrow=True)


def voiced_statement(grammar: Grammar, random: Random) -> Dialogue:
    """A bare statement answered by one or two concepts active on it: nobody asked for them."""
    request, entries = speakers(grammar, random, _number_of_voices(random))
    answer = assistant(grammar.joint_answer(entries, random))
    return Dialogue((user(request.prompt()), answer), (True,), may_be_narrow=True)


def voiced_question(grammar: Grammar, random: Random) -> Dialogue:
    """A bare question answered in the voice of any concept of its class.

    Spread over all concepts, these leave the likeliest answer neutral and every persona a small
    chance, as in a large model, instead of none: a vector then has something to raise.
    """
    entry = any_concept(grammar, random)
    request = question(grammar, random, entry.concept_class)
    return Dialogue(
        (user(request.prompt()), assistant(grammar.answer(entry, random))),
        (True,),
        may_be_narrow=True,
    )
