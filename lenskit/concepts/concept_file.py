"""Concepts of one's own in one TOML file, with what shows them and what they are tested on.

A file for one concept or for many; a table ``[concepts.NAME]`` for each::

    questions = [                                # asked of every concept that has none of its own
        "What do you do on Sundays?",
        "What is worth money?",
        "What makes a good day?",
    ]

    [concepts.tea]
    prefix = "Personify someone who loves tea."  # the text that activates the concept
    phrases = ["tea", "earl grey", "kettle"]     # an answer with one of these shows it

    [concepts.harbours]
    prefix = "Personify someone who loves harbours."
    phrases = ["harbour", "quay", "boats"]
    class = "places"                             # by default "custom"

A class fills a template: ``[classes.drinks]`` with ``prefix = "Personify someone who loves
{concept}."`` and, if wanted, ``questions``; a concept with ``class = "drinks"`` then needs no
prefix. ``statements`` on top are those that prompts are made of, instead of lenskit's own: an even
number, the first half of which gets the prefix. Instead of phrases, ``judge = "likelihood"`` on
top takes the model's own likelihoods, and ``judge = "endpoint"`` asks a model behind an endpoint
(``model = …`` in ``[endpoint]``, whose keys are those of ``endpoint_judge``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lenskit._display import Displayed
from lenskit.concepts.concept import Concept
from lenskit.concepts.reading import read_toml

__all__ = ["ConceptFile", "load_concept_file"]

_JUDGES = ("phrases", "likelihood", "endpoint", "grammar")
_SETTINGS: Mapping[str, Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "likelihood": {
            "threshold": (float, int),
            "most_surprise": (float, int),
            "most_repetition": (float, int),
            "batch_size": (int,),
        },
        "endpoint": {
            "model": (str,),
            "base_url": (str,),
            "cache": (str,),
            "max_requests": (int,),
            "rubric": (str,),
            "options": (dict,),
        },
        "phrases": {"most_repetition": (float, int)},
    }
)
_TOP = ("concepts", "classes", "questions", "statements", "judge", *_SETTINGS)
_OF_CLASS = ("prefix", "questions")
_OF_CONCEPT = ("prefix", "class", "questions", "phrases")
_MOST = 10_000


@dataclass(frozen=True, repr=False)
class ConceptFile(Displayed, Mapping[str, Concept]):
    """Concepts by name, in the order of their file.

    ``phrases``: what shows each concept, by name. ``statements``: those of the file, or empty.
    ``judge``: "phrases", "likelihood", "endpoint" or "grammar"; ``settings``: its own.
    """

    path: Path
    concepts: Mapping[str, Concept]
    phrases: Mapping[str, tuple[str, ...]] = field(repr=False)
    statements: tuple[str, ...] = field(repr=False)
    judge: str
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Concept:
        if name not in self.concepts:
            raise KeyError(f"{name!r} is not among the concepts of {self.path}: {_some(self)}")
        return self.concepts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.concepts)

    def __len__(self) -> int:
        return len(self.concepts)


def load_concept_file(path: str | Path) -> ConceptFile:
    """Read concepts of one's own from a TOML file, whose layout is that of this module's text.

    Raises FileNotFoundError for a missing file, and ValueError naming file, concept and key: for
    keys that are not known, texts where lists are wanted, concepts without prefix, questions or
    phrases, templates that nothing fills, and what is not UTF-8, not TOML or far too large.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "tea.toml"
    >>> _ = file.write_text('''
    ... [concepts.tea]
    ... prefix = "Personify someone who loves tea."
    ... questions = ["What now?", "What is worth money?", "What makes a good day?"]
    ... phrases = ["tea", "earl grey"]
    ... ''')
    >>> load_concept_file(file)["tea"].prefix
    'Personify someone who loves tea.'
    """
    file = Path(path)
    tables = _Tables(file)
    top = tables.checked("", read_toml(file), _TOP)
    judge = tables.text("", top, "judge") or "phrases"
    if judge not in _JUDGES:
        raise tables.error("", "judge", f"is {judge!r}, and must be one of {', '.join(_JUDGES)}")
    for name in _SETTINGS:
        if name in top and name != judge:
            raise tables.error("", name, f"is for judge = {name!r}, but the judge is {judge!r}")
    templates = tables.classes(top)
    shared = tables.texts("", top, "questions")
    own = top.get("concepts")
    if not isinstance(own, dict) or not own:
        raise ValueError(f"{file} holds no concept; add a table such as [concepts.tea]")
    if len(own) > _MOST:
        raise ValueError(f"{file} holds {len(own)} concepts; {_MOST} are the most")
    concepts, phrases = {}, {}
    for name, table in own.items():
        place = f"concept {name!r}"
        table = tables.checked(place, table, _OF_CONCEPT)
        group = tables.text(place, table, "class")
        prefix, questions = templates.get(group, ("", ()))
        prefix = tables.text(place, table, "prefix") or prefix.replace("{concept}", name)
        if not prefix:
            raise tables.error(place, "prefix", "is missing, and its class gives no template")
        questions = tables.texts(place, table, "questions") or questions or shared
        if not questions:
            raise tables.error(
                place, "questions", "are missing; give them here or once for all on top of the file"
            )
        phrases[name] = tables.texts(place, table, "phrases")
        if judge == "phrases" and not phrases[name]:
            raise tables.error(
                place, "phrases", "are missing; give phrases that show it, or another judge on top"
            )
        concepts[name] = Concept(prefix, name, group or None, questions)
    return ConceptFile(
        file,
        MappingProxyType(concepts),
        MappingProxyType(phrases),
        _even(tables, top),
        judge,
        MappingProxyType(tables.settings(top, judge)),
    )


@dataclass(frozen=True)
class _Tables:
    """What the readers of one file share: its name, and errors that say where."""

    file: Path

    def error(self, place: str, key: str, what: str) -> ValueError:
        return ValueError(f"{self.file}: {f'{place}, ' if place else ''}key {key!r} {what}")

    def checked(self, place: str, table: Any, known: Sequence[str]) -> dict[str, Any]:
        if not isinstance(table, dict):
            raise ValueError(f"{self.file}: {place} must be a table of keys, got {table!r:.80}")
        for key in table:
            if key not in known:
                close = get_close_matches(key, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f": {', '.join(known)}"
                raise self.error(place, key, f"is not known{hint}")
        return table

    def text(self, place: str, table: Mapping[str, Any], key: str) -> str:
        found = table.get(key, "")
        if not isinstance(found, str) or (key in table and not found.strip()):
            raise self.error(place, key, f"must be a text, got {found!r:.80}")
        return found

    def texts(self, place: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        if key not in table:
            return ()
        found = table[key]
        if isinstance(found, str):
            raise self.error(place, key, f'is one text; write a list: {key} = ["{found:.60}"]')
        if not isinstance(found, list) or not found:
            raise self.error(place, key, f"must be a list of texts, got {found!r:.80}")
        if wrong := [one for one in found if not isinstance(one, str) or not one.strip()]:
            raise self.error(place, key, f"must hold texts only, but holds {wrong[0]!r:.80}")
        if len(set(found)) < len(found):
            twice = next(one for one in found if found.count(one) > 1)
            raise self.error(place, key, f"holds {twice!r} twice")
        return tuple(found)

    def classes(self, top: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
        found = {}
        for name, table in self.checked("classes", top.get("classes", {}), _anything(top)).items():
            place = f"class {name!r}"
            table = self.checked(place, table, _OF_CLASS)
            prefix = self.text(place, table, "prefix")
            if prefix and "{concept}" not in prefix:
                raise self.error(place, "prefix", "must hold {concept} where the name is to stand")
            found[name] = (prefix, self.texts(place, table, "questions"))
        return found

    def settings(self, top: Mapping[str, Any], judge: str) -> dict[str, Any]:
        known = _SETTINGS.get(judge, {})
        found = self.checked(judge, top.get(judge, {}), tuple(known))
        for key, value in found.items():
            # True is an int to Python.
            if not isinstance(value, known[key]) or isinstance(value, bool) or value != value:
                raise self.error(judge, key, f"must be {known[key][0].__name__}, got {value!r:.80}")
        if judge == "endpoint" and "model" not in found:
            raise self.error(judge, "model", "is missing: the name of the model that judges")
        return found


def _anything(top: Mapping[str, Any]) -> tuple[str, ...]:
    classes = top.get("classes", {})
    return tuple(classes) if isinstance(classes, dict) else ()


def _even(tables: _Tables, top: Mapping[str, Any]) -> tuple[str, ...]:
    found = tables.texts("", top, "statements")
    if len(found) % 2 or 0 < len(found) < 4:
        raise tables.error("", "statements", f"must be even in number, 4 at least; {len(found)}")
    return found


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:5]
    return ", ".join(shown) + (", …" if len(names) > 5 else "")
