"""Concepts and concept classes: what a prefix is meant to activate, and the questions that test it.

The five classes of the embedded grammar are ``concepts["fears"]["spiders"]`` and so on; a concept
of one's own is ``Concept(prefix="Personify someone who likes MIT more than Harvard.")``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lenskit._display import Displayed, count, quoted
from lenskit.embedded.dialogue import STATEMENT_PROMPT, question_prompt, statement_prompt
from lenskit.embedded.grammar import CLASS_NAMES, load_grammar

__all__ = [
    "STATEMENT_PROMPT",
    "Concept",
    "ConceptClass",
    "concepts",
    "question_prompt",
    "statement_prompt",
    "statements",
]


@dataclass(frozen=True, repr=False)
class Concept(Displayed):
    """A concept: the prefix that activates it, and the questions on which steering is tested.

    Raises ValueError when the prefix is empty, or the questions are one string.
    """

    prefix: str
    name: str = "custom"
    concept_class: str | None = None
    questions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not self.prefix.strip():
            raise ValueError(
                f"prefix of concept {self.name!r} is {self.prefix!r}; "
                "give the text that activates the concept, such as 'Take on a cheerful mood.'"
            )
        object.__setattr__(self, "questions", _questions(self.name, self.questions))

    def _headline(self) -> str:
        of = "" if self.concept_class is None else f" of {self.concept_class}"
        return f"Concept {self.name!r}{of}"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {"prefix": self.prefix}
        shown |= {f"question {i}": text for i, text in enumerate(self.questions[:8], start=1)}
        rest = self.questions[8:]
        return shown | ({"further": count(len(rest), "question")} if rest else {})


def _questions(name: str, questions: Sequence[str]) -> tuple[str, ...]:
    """A list of questions is welcome, but a concept stays hashable."""
    if isinstance(questions, str):
        raise ValueError(
            f"questions of concept {name!r} are one string, {questions!r}; "
            f"give a tuple of them: ({questions!r},)"
        )
    questions = tuple(questions)
    if wrong := [one for one in questions if not isinstance(one, str) or not one.strip()]:
        raise ValueError(f"questions of concept {name!r} hold {wrong[0]!r}, which is no text")
    return questions


class ConceptClass(Displayed, Mapping[str, Concept]):
    """The concepts of one class by name; ``prefix`` is their template, ``questions`` the tests."""

    def __init__(self, name: str, prefix: str, questions: tuple[str, ...], members: list[Concept]):
        self.name, self.prefix, self.questions = name, prefix, questions
        self._members = {concept.name: concept for concept in members}

    def __getitem__(self, name: str) -> Concept:
        if name not in self._members:
            raise KeyError(
                f"{name!r} is not among the {len(self)} concepts of class {self.name!r}, "
                f"such as {', '.join(list(self)[:5])}; or make your own: Concept(prefix=...)"
            )
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def _headline(self) -> str:
        return f"ConceptClass {self.name!r}, {count(len(self), 'concept')}"

    def _rows(self) -> dict[str, object]:
        return {
            "prefix": self.prefix,
            "questions": quoted(self.questions),
            "concepts": ", ".join(self),
        }


class _Concepts(Displayed, Mapping[str, ConceptClass]):
    """The classes of the embedded grammar, read from its files when first asked for."""

    def __getitem__(self, name: str) -> ConceptClass:
        if name not in CLASS_NAMES:
            raise KeyError(f"{name!r} is not a concept class; there are {', '.join(CLASS_NAMES)}")
        rules = load_grammar().classes[name]
        questions = tuple(wordings[0] for wordings in rules.questions)
        members = [Concept(rules.prefix_for(e), e, name, questions) for e in rules.entries]
        return ConceptClass(name, rules.prefix, questions, members)

    def __iter__(self) -> Iterator[str]:
        return iter(CLASS_NAMES)

    def __len__(self) -> int:
        return len(CLASS_NAMES)

    def _headline(self) -> str:
        return f"{len(self)} concept classes"

    def _rows(self) -> dict[str, object]:
        return {name: f"{len(members)}: {', '.join(members)}" for name, members in self.items()}


concepts: Mapping[str, ConceptClass] = _Concepts()


def statements(half: str = "first") -> tuple[str, ...]:
    """General statements to have thoughts about, topics taking turns.

    ``half`` is "first" or "second" (200 each) or "held_out" (80 that the embedded model never saw).

    >>> len(lk.statements("first")), len(lk.statements("held_out"))
    (200, 80)
    """
    return tuple(statement for _, statement in load_grammar().half(half))
