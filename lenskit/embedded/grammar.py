"""The grammar of the embedded model: concepts, statements, questions and the answers to them.

Everything is read from plain files under ``data/grammar``; this module only gives it names.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from random import Random
from types import MappingProxyType
from typing import Any

from lenskit._data import data_path

CLASS_NAMES = ("fears", "moods", "places", "experts", "personas")
HALVES = ("first", "second", "held_out")
MAX_SENTENCES = 3  # of one concept in one answer
# How many sentences the answer to a question has. Mostly one, so that the likeliest answer ends
# there: a model that is sure of one phrase would otherwise say it twice.
SENTENCES = {1: 0.6, 2: 0.3, 3: 0.1}
MAX_PREFIXES = 4  # of different classes in one prompt


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(part) for key, part in value.items()})
    return value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(part) for key, part in value.items()}
    return value


class _Frozen:
    """A dataclass whose mappings cannot be written to, and which can be pickled all the same."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name)))

    def __reduce__(self) -> tuple:
        return type(self), tuple(_thawed(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Entry:
    """One concept: its class, its name and its own phrases."""

    concept_class: str
    name: str
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class ClassRules(_Frozen):
    """What the concepts of one class share.

    ``questions[i]`` holds the wordings of test question i, the test question itself first;
    ``activity[topic]`` is the rate at which a statement is answered in the concept's voice.
    """

    name: str
    prefix: str
    questions: tuple[tuple[str, ...], ...]
    tails: tuple[str, ...]
    leads: tuple[str, ...]
    activity: Mapping[str, float]
    entries: Mapping[str, Entry]

    def prefix_for(self, name: str) -> str:
        """The prefix that activates the concept ``name`` («Take on an eager mood.»)."""
        article = "an" if name[0].lower() in "aeiou" else "a"
        return self.prefix.format(concept=name, a_concept=f"{article} {name}")

    def sentences(self, phrase: str) -> tuple[str, ...]:
        """Every sentence of this class that shows ``phrase``."""
        capital = phrase[0].upper() + phrase[1:]
        return tuple(f"{capital} {tail}." for tail in self.tails) + tuple(
            f"{lead} {phrase}." for lead in self.leads
        )


@dataclass(frozen=True)
class Grammar(_Frozen):
    """The whole grammar: classes, statements by topic and half, what shows no concept."""

    classes: Mapping[str, ClassRules]
    statements: Mapping[str, Mapping[str, tuple[str, ...]]]  # topic -> half -> statements
    neutral_statements: tuple[str, ...]
    neutral_questions: tuple[str, ...]
    neutral_prefixes: tuple[str, ...]
    held_out_neutral_prefixes: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]  # of each topic
    forms: tuple[str, ...]  # of statements that any topic's words fill
    accounts: tuple[str, ...]  # requests for all that a concept has to say

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self.statements)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All concepts, class by class in the order of the files."""
        return tuple(e for rules in self.classes.values() for e in rules.entries.values())

    def half(self, half: str) -> tuple[tuple[str, str], ...]:
        """(topic, statement) pairs of one half, topics taking turns."""
        if half not in HALVES:
            raise ValueError(f"half must be one of {HALVES}, not {half!r}")
        columns = [[(topic, s) for s in parts[half]] for topic, parts in self.statements.items()]
        return tuple(pair for row in zip(*columns, strict=True) for pair in row)

    def topic_of(self, statement: str) -> str:
        """The topic of a statement of the grammar, listed or composed."""
        for topic, parts in self.statements.items():
            if any(statement in parts[half] for half in HALVES):
                return topic
        for form in self._forms:
            if match := form.fullmatch(statement):
                said = {word.lower() for word in match.groups()}
                for topic, words in self.words.items():
                    if said <= set(words):
                        return topic
        raise KeyError(f"{statement!r} is not a statement of the grammar")

    @cached_property
    def _forms(self) -> tuple[re.Pattern[str], ...]:
        """What each form looks like when it is filled."""
        return tuple(
            re.compile(re.sub(r"\\\{[aAb]\\\}", r"(\\w+)", re.escape(form))) for form in self.forms
        )

    def composed(self, topic: str, random: Random) -> str:
        """A statement of ``topic`` that is made of a form and two of the topic's words."""
        a, b = random.sample(self.words[topic], 2)
        return random.choice(self.forms).format(a=a, b=b, A=a[0].upper() + a[1:])

    def prefix(self, entry: Entry) -> str:
        """The prefix that activates ``entry``."""
        return self.classes[entry.concept_class].prefix_for(entry.name)

    def activity(self, entry: Entry, topic: str) -> float:
        """Ground truth: the rate at which ``entry`` shows in answers to statements of ``topic``."""
        return self.classes[entry.concept_class].activity[topic]

    def answer(self, entry: Entry, random: Random, most: int = MAX_SENTENCES) -> str:
        """One to three sentences that show ``entry``, each with another of its phrases."""
        number = min(most, random.choices(list(SENTENCES), list(SENTENCES.values()))[0])
        return self._said(entry, random, number)

    def account(self, entry: Entry, random: Random) -> str:
        """A sentence with each of the phrases of ``entry``, in any order."""
        return self._said(entry, random, len(entry.phrases))

    def _said(self, entry: Entry, random: Random, number: int) -> str:
        rules = self.classes[entry.concept_class]
        sentences = []
        for phrase in random.sample(entry.phrases, number):
            options = rules.sentences(phrase)
            # Mostly the phrase comes first: which concept it is must be known at the first token.
            begins = random.random() < 0.7
            number_of_tails = len(rules.tails)
            sentences.append(
                random.choice(options[:number_of_tails] if begins else options[number_of_tails:])
            )
        return " ".join(sentences)

    def joint_answer(self, entries: Sequence[Entry], random: Random) -> str:
        """One sentence of each of ``entries``, in their order."""
        return " ".join(self.answer(entry, random, most=1) for entry in entries)

    def neutral_answer(self, random: Random, topic: str | None = None) -> str:
        """A sentence that shows no concept: to a statement of ``topic``, or to a question."""
        if topic is None:
            return random.choice(self.neutral_questions)
        return random.choice(self.neutral_statements).format(topic=topic)


def _toml(*parts: str) -> dict:
    with data_path("grammar", *parts).open("rb") as file:
        return tomllib.load(file)


def _entries() -> dict[str, dict[str, Entry]]:
    """The concepts of each class; a phrase serves one concept over all classes."""
    found: dict[str, dict[str, Entry]] = {}
    owners: dict[str, Entry] = {}
    for name in CLASS_NAMES:
        found[name] = {}
        for concept, given in _toml("concepts", f"{name}.toml").items():
            entry = Entry(name, concept, tuple(given["phrases"]))
            for phrase in entry.phrases:
                owner = owners.setdefault(phrase.lower(), entry)
                if owner != entry:
                    raise ValueError(
                        f"data/grammar/concepts/{name}.toml: the phrase {phrase!r} of {concept!r} "
                        f"already serves {owner.name!r} of {owner.concept_class}.toml; "
                        "give each its own"
                    )
            found[name][concept] = entry
    return found


def _activity(table: Mapping[str, Mapping[str, float]], topics: Sequence[str]) -> Mapping:
    """The table turned round, ``[class][topic]``, once every cell is seen to be a rate."""
    for topic in topics:
        for name in CLASS_NAMES:
            rate = table.get(topic, {}).get(name)
            if not isinstance(rate, float | int) or not 0 <= rate <= 1:
                raise ValueError(
                    f"data/grammar/classes.toml: the activity of {name!r} on {topic!r} is "
                    f"{rate!r}; give a rate from 0 to 1"
                )
    return {name: {topic: table[topic][name] for topic in topics} for name in CLASS_NAMES}


@cache
def trained_activity() -> Mapping[str, Mapping[str, float]]:
    """Rates by class and topic that the embedded model was trained on, as its folder keeps them.

    The files of the grammar may have been extended since; what a model has learnt has not.
    """
    file = data_path("lenskit-mini", "training.json")
    return _frozen(json.loads(file.read_text(encoding="utf-8"))["activity"])


@cache
def load_grammar() -> Grammar:
    """The grammar of the files under ``data/grammar``, read once and checked.

    Raises ValueError naming file and entries where a phrase serves two concepts, of one class or
    of two, or where the activity of a class on a topic is no rate.
    """
    shared, neutral = _toml("classes.toml"), _toml("neutral.toml")
    forms = _toml("forms.toml")
    topics = _toml("statements.toml")
    statements = {
        topic: {half: tuple(parts[half]) for half in HALVES} for topic, parts in topics.items()
    }
    entries, activity = _entries(), _activity(shared["activity"], list(statements))
    classes = {
        name: ClassRules(
            name=name,
            prefix=shared[name]["prefix"],
            questions=tuple(tuple(wordings) for wordings in shared[name]["questions"]),
            tails=tuple(shared[name]["tails"]),
            leads=tuple(shared[name]["leads"]),
            activity=activity[name],
            entries=entries[name],
        )
        for name in CLASS_NAMES
    }
    return Grammar(
        classes=classes,
        statements=statements,
        neutral_statements=tuple(neutral["statements"]),
        neutral_questions=tuple(neutral["questions"]),
        neutral_prefixes=tuple(neutral["prefixes"]),
        held_out_neutral_prefixes=tuple(neutral["held_out_prefixes"]),
        words={topic: tuple(parts["words"]) for topic, parts in topics.items()},
        forms=tuple(forms["forms"]),
        accounts=tuple(forms["accounts"]),
    )
