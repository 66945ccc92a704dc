"""The exact judge: an answer counts only if it parses completely as an answer of its concepts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain

from lenskit._display import Displayed
from lenskit.embedded.grammar import MAX_PREFIXES, MAX_SENTENCES, Entry, load_grammar

REASONS = (
    "on concept",
    "neutral",
    "missing a concept",
    "off concept",
    "ill formed",
    "unfinished",
    "repeating",
)
MOST_SENTENCES = max(MAX_PREFIXES, MAX_SENTENCES)


@dataclass(frozen=True)
class Verdict(Displayed):
    """``score`` is 1 where the answer is what was asked for; ``reason`` is one of ``REASONS``."""

    score: int
    reason: str


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence: whose it is (None: neutral) and the phrase that shows it."""

    entry: Entry | None
    phrase: str


@cache
def _sentences() -> Mapping[str, Sentence]:
    """Every sentence of the grammar: whose it is, and by which phrase."""
    grammar = load_grammar()
    table: dict[str, Sentence] = {}
    for entry in grammar.entries:
        rules = grammar.classes[entry.concept_class]
        for phrase in entry.phrases:
            table |= dict.fromkeys(rules.sentences(phrase), Sentence(entry, phrase))
    topical = (t.format(topic=k) for t in grammar.neutral_statements for k in grammar.topics)
    for text in chain(grammar.neutral_questions, topical):
        table[text] = Sentence(None, text)
    return table


@cache
def _sorted_sentences() -> list[str]:
    return sorted(_sentences())


def _begins_a_sentence(text: str) -> bool:
    ordered = _sorted_sentences()
    i = bisect_left(ordered, text)
    return i < len(ordered) and ordered[i].startswith(text)


def parse(answer: str) -> tuple[list[Sentence], str]:
    """The whole sentences at the start of ``answer``, read, and what is left over."""
    table, found, rest = _sentences(), [], answer.strip()
    while rest:
        end = rest.find(".") + 1
        sentence = table.get(rest[:end]) if end else None
        # Two sentences are one space apart; anything else is ill formed.
        if sentence is None or (end < len(rest) and rest[end] != " "):
            break
        found.append(sentence)
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


def judge_active(active: Collection[Entry], answer: str) -> Verdict:
    """Score 1 only if ``answer`` parses completely as an answer of all ``active`` concepts.

    It has to show each of them and no other, in one to four sentences in any order; where none is
    active, it has to be neutral. Otherwise 0 with the reason: it shows no concept, only some of
    those asked for, something else (too), is ill formed, stops before its end, or says the same
    thing twice. Text cannot tell an answer cut between two sentences from a shorter one.
    """
    found, rest = parse(answer)
    phrases = [sentence.phrase for sentence in found]
    if _repeats(answer) or len(set(phrases)) < len(phrases):
        return Verdict(0, "repeating")
    # The start of an over-long answer says nothing about its end: it has to stop by itself.
    if not answer.strip() or (rest and _begins_a_sentence(rest)):
        return Verdict(0, "unfinished")
    if rest or len(found) > MOST_SENTENCES:
        return Verdict(0, "ill formed")
    shown, asked = {sentence.entry for sentence in found}, set(active)
    if shown == {None}:
        return Verdict(int(not asked), "neutral")
    if shown == asked:
        return Verdict(1, "on concept")
    return Verdict(0, "missing a concept" if shown < asked else "off concept")


def judge_answer(concept_class: str, name: str, answer: str) -> Verdict:
    """``judge_active`` of one concept; raises KeyError for a concept not in the grammar."""
    return judge_active((load_grammar().classes[concept_class].entries[name],), answer)


def concepts_shown(answer: str) -> tuple[tuple[str, str], ...]:
    """(class, name) of the concept of each whole sentence at the start of ``answer``.

    >>> lk.concepts_shown("This sentence is not of the grammar.")
    ()
    """
    entries = (sentence.entry for sentence in parse(answer)[0])
    return tuple((entry.concept_class, entry.name) for entry in entries if entry)
