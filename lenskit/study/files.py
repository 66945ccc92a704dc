"""A study's folder: its settings, and a file for each concept, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from inspect import getclosurevars, isfunction, signature
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.models import model_fingerprint
from lenskit.study.bench import study_concept
from lenskit.study.study import Study
from lenskit.study.ways import Variant


def distinct(concepts: Iterable[Concept] | Concept) -> list[Concept]:
    """The concepts of a study; raises ValueError for none, or two of the same class and name.

    A class of concepts stands for its members.
    """
    if isinstance(concepts, Mapping):
        concepts = concepts.values()
    concepts = [concepts] if isinstance(concepts, Concept) else list(concepts)
    if wrong := [one for one in concepts if not isinstance(one, Concept)]:
        raise TypeError(f"concepts must be Concepts, or one of them; got {wrong[0]!r}")
    names = [(c.concept_class, c.name) for c in concepts]
    if not concepts or len(set(names)) < len(names):
        raise ValueError(f"concepts must be at least one, and differ in class or name: {names}")
    return concepts


def finished(out: str | Path, concepts: Iterable[Concept]) -> list[Concept]:
    """Those concepts whose part of the study the folder ``out`` holds."""
    return [concept for concept in concepts if concept_file(Path(out), concept).exists()]


def read_study(out: str | Path, concepts: Iterable[Concept]) -> Study:
    """The finished study of these concepts that the folder ``out`` holds.

    Raises ValueError where a concept is still to be done.

    >>> import tempfile
    >>> options = {"coefficients": 0.04, "prompts": 40, "max_new_tokens": 3, "progress": False}
    >>> out = tempfile.mkdtemp()
    >>> done = lk.run_study(model, concept, lk.Variant(), out=out, **options)
    >>> len(lk.read_study(out, [concept]).answers) == len(done.answers)
    True
    """
    concepts = list(concepts)
    files = [concept_file(Path(out), concept) for concept in concepts]
    left = [c.name for c, file in zip(concepts, files, strict=True) if not file.exists()]
    if left:
        raise ValueError(f"out={str(out)!r} does not hold {', '.join(left)} yet")
    return Study(pd.DataFrame([row for file in files for row in json.loads(file.read_text())]))


def concept_file(folder: Path, concept: Concept) -> Path:
    # Concepts of one's own may share a name: another prefix or question is another file.
    digest = hashlib.sha256("\n".join((concept.prefix, *concept.questions)).encode())
    words = [concept.concept_class or "custom", concept.name]
    tidy = ("".join(c if c.isalnum() else "-" for c in word) for word in words)
    return folder / ".".join((*tidy, digest.hexdigest()[:8], "json"))


def write_json(file: Path, value: object) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=0))
    temporary.replace(file)


def _described(value: Any) -> Any:
    """A setting as JSON that is the same in every process, unlike the repr of a function."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isfunction(value):
        # What a function encloses belongs to it: the phrases of a judge, say.
        enclosed = getclosurevars(value).nonlocals
        return [f"{value.__module__}.{value.__qualname__}", _described(enclosed)]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return type(value).__qualname__ if f" at {hex(id(value))}" in text else text


def study_folder(
    folder: Path, model: TransformerBridge, variants: Sequence[Variant], options: dict
) -> Path:
    """The study's folder, made or found to hold the same study."""
    known = signature(study_concept).parameters.values()
    defaults = {p.name: p.default for p in known if p.default is not p.empty}
    chosen = {name: _described(value) for name, value in (defaults | options).items()}
    # Batches are no part of what is found.
    chosen.pop("batch_size")
    settings = {
        "model": model_fingerprint(model),
        "variants": [asdict(v) for v in variants],
        "options": chosen,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.settings"
    if not file.exists():
        write_json(file, settings)
    elif json.loads(file.read_text()) != settings:
        raise ValueError(
            f"out={str(folder)!r} holds a study with other settings; choose another folder, "
            "or remove that one to start again"
        )
    return folder
