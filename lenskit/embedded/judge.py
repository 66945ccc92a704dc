"""The exact judge: an answer counts only if it parses completely as an answer of its concept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain

from lenskit._display import Displayed
from lenskit.embedded.grammar import MAX_SENTENCES, Entry, load_grammar

REASONS = ("on concept", "neutral", "off concept", "ill formed", "unfinished", "repeating")


@dataclass(frozen=True)
class Verdict(Displayed):
    """``score`` is 1 for "on concept" and 0 otherwise; ``reason`` is one of ``REASONS``."""

    score: int
    reason: str


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence: whose it is (None: neutral) and the phrase that shows it."""

    entry: Entry | None
    phrase: str


@cache
def _sentences() -> Mapping[str, tuple[Sentence, ...]]:
    """Every sentence of the grammar, with all its readings (a phrase may serve two classes)."""
    grammar = load_grammar()
    table: dict[str, tuple[Sentence, ...]] = {}
    for entry in grammar.entries:
        rules = grammar.classes[entry.concept_class]
        for phrase in entry.phrases:
            for text in rules.sentences(phrase):
                table[text] = (*table.get(text, ()), Sentence(entry, phrase))
    topical = (t.format(topic=k) for t in grammar.neutral_statements for k in grammar.topics)
    for text in chain(grammar.neutral_questions, topical):
        table[text] = (Sentence(None, text),)
    return table


@cache
def _sorted_sentences() -> list[str]:
    return sorted(_sentences())


def _begins_a_sentence(text: str) -> bool:
    ordered = _sorted_sentences()
    i = bisect_left(ordered, text)
    return i < len(ordered) and ordered[i].startswith(text)


def parse(answer: str) -> tuple[list[tuple[Sentence, ...]], str]:
    """The readings of each whole sentence at the start of ``answer``, and what is left over."""
    table, found, rest = _sentences(), [], answer.strip()
    while rest:
        end = rest.find(".") + 1
        readings = table.get(rest[:end]) if end else None
        # Two sentences are one space apart; anything else is ill formed.
        if readings is None or (end < len(rest) and rest[end] != " "):
            break
        found.append(readings)
        rest = rest[end + 1 :]
    return found, rest


def _repeats(text: str, times: int = 3) -> bool:
    """Whether some run of one to six words stands ``times`` times in a row."""
    words = text.lower().replace(".", " ").split()
    for n in range(1, 7):
        for i in range(len(words) - n * times + 1):
            if all(words[i : i + n] == words[i + n * k : i + n * (k + 1)] for k in range(1, times)):
                return True
    return False


def judge_answer(concept_class: str, name: str, answer: str) -> Verdict:
    """Score 1 only if ``answer`` parses completely as an answer of the concept and of no other.

    Otherwise 0 with the reason: it shows no concept, shows something other than the concept (too),
    is ill formed, stops before its end, or says the same thing twice. Text cannot tell an answer
    cut between two sentences from a shorter one. Raises KeyError for a concept not in the grammar.
    """
    own = load_grammar().classes[concept_class].entries[name]
    found, rest = parse(answer)
    phrases = [readings[0].phrase for readings in found]
    if _repeats(answer) or len(set(phrases)) < len(phrases):
        return Verdict(0, "repeating")
    # The start of an over-long answer says nothing about its end: it has to stop by itself.
    if not answer.strip() or (rest and _begins_a_sentence(rest)):
        return Verdict(0, "unfinished")
    if rest or len(found) > MAX_SENTENCES:
        return Verdict(0, "ill formed")
    if all(any(reading.entry is own for reading in readings) for readings in found):
        return Verdict(1, "on concept")
    if all(readings[0].entry is None for readings in found):
        return Verdict(0, "neutral")
    return Verdict(0, "off concept")


def concepts_shown(answer: str) -> tuple[tuple[str, str], ...]:
    """(class, name) of the concept of each whole sentence at the start of ``answer``.

    >>> lk.concepts_shown("This sentence is not of the grammar.")
    ()
    """
    return tuple(
        (r[0].entry.concept_class, r[0].entry.name) for r in parse(answer)[0] if r[0].entry
    )
