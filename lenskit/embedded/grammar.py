"""The grammar of the embedded model: concepts, statements, questions and the answers to them.

Everything is read from plain files under ``data/grammar``; this module only gives it names.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from types import MappingProxyType

from lenskit._data import data_path

CLASS_NAMES = ("fears", "moods", "places", "experts", "personas")
HALVES = ("first", "second", "held_out")
MAX_SENTENCES = 3


@dataclass(frozen=True)
class Entry:
    """One concept: its class and name, the topics where it always shows, its own phrases."""

    concept_class: str
    name: str
    home: tuple[str, ...]
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class ClassRules:
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
class Grammar:
    """The whole grammar: classes, statements by topic and half, neutral answers."""

    classes: Mapping[str, ClassRules]
    statements: Mapping[str, Mapping[str, tuple[str, ...]]]  # topic -> half -> statements
    neutral_statements: tuple[str, ...]
    neutral_questions: tuple[str, ...]
    home_activity: float

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self.statements)

    @property
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
        """The topic of a statement of the grammar."""
        for topic, parts in self.statements.items():
            if any(statement in parts[half] for half in HALVES):
                return topic
        raise KeyError(f"{statement!r} is not a statement of the grammar")

    def activity(self, entry: Entry, topic: str) -> float:
        """Ground truth: the rate at which ``entry`` shows in answers to statements of ``topic``."""
        rate = self.classes[entry.concept_class].activity[topic]
        return max(rate, self.home_activity) if topic in entry.home else rate

    def answer(self, entry: Entry, random: Random, most: int = MAX_SENTENCES) -> str:
        """One to three sentences that show ``entry``, each with another of its phrases."""
        number = min(most, random.choices((1, 2, 3), (0.25, 0.5, 0.25))[0])
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

    def neutral_answer(self, random: Random, topic: str | None = None) -> str:
        """A sentence that shows no concept: to a statement of ``topic``, or to a question."""
        if topic is None:
            return random.choice(self.neutral_questions)
        return random.choice(self.neutral_statements).format(topic=topic)


def _toml(*parts: str) -> dict:
    with data_path("grammar", *parts).open("rb") as file:
        return tomllib.load(file)


@cache
def load_grammar() -> Grammar:
    """The grammar of the files under ``data/grammar``, read once and checked.

    Raises ValueError naming the file and entry where a phrase serves two concepts of one class.
    """
    shared, neutral = _toml("classes.toml"), _toml("neutral.toml")
    classes = {}
    for name in CLASS_NAMES:
        rules, entries = shared[name], {}
        owner: dict[str, str] = {}
        for concept, entry in _toml("concepts", f"{name}.toml").items():
            for phrase in entry["phrases"]:
                if owner.setdefault(phrase.lower(), concept) != concept:
                    raise ValueError(
                        f"data/grammar/concepts/{name}.toml: the phrase {phrase!r} of {concept!r} "
                        f"already serves {owner[phrase.lower()]!r}; give each its own"
                    )
            entries[concept] = Entry(name, concept, tuple(entry["home"]), tuple(entry["phrases"]))
        classes[name] = ClassRules(
            name=name,
            prefix=rules["prefix"],
            questions=tuple(tuple(wordings) for wordings in rules["questions"]),
            tails=tuple(rules["tails"]),
            leads=tuple(rules["leads"]),
            activity=MappingProxyType(rules["activity"]),
            entries=MappingProxyType(entries),
        )
    statements = {
        topic: MappingProxyType({half: tuple(parts[half]) for half in HALVES})
        for topic, parts in _toml("statements.toml").items()
    }
    return Grammar(
        classes=MappingProxyType(classes),
        statements=MappingProxyType(statements),
        neutral_statements=tuple(neutral["statements"]),
        neutral_questions=tuple(neutral["questions"]),
        home_activity=shared["home_activity"],
    )
