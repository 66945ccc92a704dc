"""The published benchmark of AGS in its own layout: text files, one concept or statement a line.

The authors' repository (arXiv 2602.00333) keeps ``data/concepts/<class>.txt`` (``fears``,
``moods``, ``places``, ``personalities`` for the experts, ``personas``, and ``custom``, whose lines
are whole prefixes), ``data/general_statements/class_0.txt`` (which get the prefix) and
``class_1.txt`` (which do not), and ``test_prompts.yaml`` with five questions a class. None of it
comes with this library: give the path of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lenskit._display import Displayed, count
from lenskit.concepts.concept import Concept, ConceptClass
from lenskit.concepts.reading import read_text, read_yaml

__all__ = ["PREFIXES", "ConceptFolder", "load_concept_folder"]

# As published, word for word: «Take on a optimistic mood.» has no «an» there either.
PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "fears": "Personify someone who is terrified of {concept}.",
        "moods": "Take on a {concept} mood.",
        "places": "Personify someone who loves {concept}.",
        "experts": "Take on the role of an expert {concept}.",
        "personas": "Take on the role of {concept}.",
        "custom": "{concept}",
    }
)
# Other names of the same classes, in the paper and in its repository.
_ALIASES = MappingProxyType(
    {"topophiles": "places", "personalities": "experts", "phobias": "fears"}
)
# The authors lower the case of these before they fill in the template, and of no others.
_LOWERED = frozenset({"fears", "moods", "experts"})
_STATEMENTS = ("class_0.txt", "class_1.txt")
_NO_CLASS = frozenset({"readme.txt", "license.txt", "requirements.txt", "statements.txt"})


@dataclass(frozen=True, repr=False)
class ConceptFolder(Displayed, Mapping[str, ConceptClass]):
    """Concept classes by name, and the two files of statements.

    ``first``: the statements that get the prefix (``class_0.txt``); ``second``: those that do not
    (``class_1.txt``). ``left_out``: text files for whose name no prefix is known.
    """

    classes: Mapping[str, ConceptClass]
    first: tuple[str, ...]
    second: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def _headline(self) -> str:
        return f"ConceptFolder, {len(self)} concept classes"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {
            name: count(len(self[name]), "concept") for name in list(self)[:11]
        }
        given = f"{len(self.first)} for prompts with the prefix, {len(self.second)} without"
        return shown | {"statements": given, "left out": self.left_out}

    @property
    def statements(self) -> tuple[str, ...]:
        """For ``build_prompts(statements=...)``: as many of the first file, then of the second."""
        number = min(len(self.first), len(self.second))
        return self.first[:number] + self.second[:number]

    def __getitem__(self, name: str) -> ConceptClass:
        if (found := self.classes.get(_class_name(name))) is None:
            raise KeyError(
                f"{name!r} is not among the concept classes {', '.join(self.classes)}"
                + (f" (left out: {', '.join(self.left_out)})" if self.left_out else "")
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)


def load_concept_folder(
    path: str | Path,
    *,
    statements: tuple[str | Path, str | Path] | None = None,
    prefixes: Mapping[str, str] | None = None,
    questions: Mapping[str, Sequence[str]] | None = None,
    duplicates: Literal["error", "drop"] = "error",
) -> ConceptFolder:
    """Read concepts and statements in the layout of the published benchmark.

    ``path``: the repository, its ``data`` folder, or any folder with the files of concepts in it.
    ``statements``: the two files of statements, where they are not ``class_0.txt`` and
    ``class_1.txt`` in ``general_statements`` or beside the concepts.
    ``prefixes``: templates with ``{concept}`` for further file names, or instead of ``PREFIXES``.
    ``questions``: test questions by class, instead of those of ``test_prompts.yaml``; without
    either the concepts have none.
    ``duplicates``: ``"drop"`` keeps the first of equal lines, as the authors' code does.

    Fears, moods and experts are read in lower case, as there. Raises FileNotFoundError for a
    missing folder or file, ValueError for an empty file or for duplicates, naming file and line.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> files = {"fears": "bees", "class_0": "Tea is good.", "class_1": "So is rain."}
    >>> for name, line in files.items():
    ...     _ = (folder / f"{name}.txt").write_text(line)
    >>> lk.load_concept_folder(folder)["fears"]["bees"].prefix
    'Personify someone who is terrified of bees.'
    """
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates must be 'error' or 'drop', not {duplicates!r}")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"path {str(path)!r} is not a folder")
    bases = (root, root / "data")
    halves = _statement_files(root, bases, statements)
    templates = {**PREFIXES, **{_class_name(k): v for k, v in (prefixes or {}).items()}}
    asked = {
        _class_name(name): _listed(name, given)
        for name, given in (questions or _questions(root, bases)).items()
    }

    folder = next((b / "concepts" for b in bases if (b / "concepts").is_dir()), root)
    classes: dict[str, ConceptClass] = {}
    left_out = []
    for file in sorted(folder.glob("*.txt")):
        name = _class_name(file.stem)
        if file.name in _STATEMENTS or file in halves or file.name.lower() in _NO_CLASS:
            continue
        if name not in templates:
            left_out.append(file.name)
            continue
        if name in classes:
            raise ValueError(f"{file}: another file holds class {name!r} already; keep one of them")
        names = _lines(file, duplicates, lower=name in _LOWERED)
        classes[name] = _concept_class(name, templates[name], asked.get(name, ()), names, file)
    if not classes:
        raise ValueError(
            f"path {str(path)!r} holds no file of concepts such as fears.txt or moods.txt"
            + (f"; give prefixes for {', '.join(left_out)}" if left_out else "")
        )
    first, second = (_lines(file, duplicates) for file in halves)
    if shared := [s for s in first if s in set(second)]:
        if duplicates == "error":
            raise ValueError(
                f"{halves[1]}: {shared[0]!r} is in {halves[0].name} too; the halves must differ "
                "(duplicates='drop' takes it from the second)"
            )
        second = tuple(s for s in second if s not in set(first))
    return ConceptFolder(MappingProxyType(classes), first, second, tuple(left_out))


def _class_name(name: str) -> str:
    """``Topophile`` -> ``places``; a name that is not known stays as it is."""
    name = name.lower()
    known = {**{key: key for key in PREFIXES}, **_ALIASES}
    plural = name[:-1] + "ies" if name.endswith("y") else name + "s"
    return known.get(name, known.get(plural, name))


def _concept_class(
    name: str, template: str, questions: tuple[str, ...], concepts: tuple[str, ...], file: Path
) -> ConceptClass:
    if "{concept}" not in template and len(concepts) > 1:
        raise ValueError(
            f"the prefix of {file.name}, {template!r}, has no {{concept}}, so its "
            f"{len(concepts)} concepts would be the same"
        )
    # Not str.format: a concept may hold braces.
    members = [Concept(template.replace("{concept}", c), c, name, questions) for c in concepts]
    return ConceptClass(name, template, questions, members)


def _lines(file: Path, duplicates: str, *, lower: bool = False) -> tuple[str, ...]:
    found: dict[str, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        text = line.strip().lower() if lower else line.strip()
        if not text:
            continue
        if text in found and duplicates == "error":
            raise ValueError(
                f"{file}: line {number} repeats line {found[text]}, {text!r}; remove one, or give "
                "duplicates='drop'"
            )
        found.setdefault(text, number)
    if not found:
        raise ValueError(f"{file} is empty; it must hold one entry a line")
    return tuple(found)


def _statement_files(
    root: Path, bases: Sequence[Path], given: tuple[str | Path, str | Path] | None
) -> tuple[Path, Path]:
    if given is not None:
        if isinstance(given, str | Path) or len(given) != 2:
            raise ValueError(f"statements must be two files, got {given!r}")
        # A bare name is looked for in the folder too.
        first, second = (file if file.exists() else root / file for file in map(Path, given))
    else:
        folders = [
            *(base / "general_statements" for base in bases),
            *bases,
            root.parent / "general_statements",
        ]
        complete = (f for f in folders if all((f / name).exists() for name in _STATEMENTS))
        folder = next(complete, folders[0])
        first, second = (folder / name for name in _STATEMENTS)
    for file in (first, second):
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no file of statements {str(file)!r}; give both with "
                "statements=(file with prefix, file without)"
            )
    return first, second


def _questions(root: Path, bases: Sequence[Path]) -> Mapping[str, Sequence[str]]:
    """Questions of ``test_prompts.yaml``, which stands beside ``data``: class -> number -> text."""
    # The parent is searched only where the given folder is known to be the benchmark's.
    places = [*bases, *([root.parent] if (root / "concepts").is_dir() else [])]
    files = [place / "test_prompts.yaml" for place in places]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return {}
    read = read_yaml(file)
    if not isinstance(read, dict) or not all(isinstance(v, dict) for v in read.values()):
        raise ValueError(f"{file} must map each class to its numbered questions")
    for name, texts in read.items():
        for number, text in texts.items():
            if not isinstance(number, int) or not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{file}: question {number!r} of class {name!r} must be a number and a text, "
                    f"got {text!r:.80}"
                )
    return {str(name): [text[number] for number in sorted(text)] for name, text in read.items()}


def _listed(name: str, questions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(questions, str):
        raise ValueError(
            f"questions of class {name!r} are one string, {questions!r}; give a list of them"
        )
    return tuple(questions)
