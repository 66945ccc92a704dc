"""The whole method over many concepts: vectors made in several ways, steered, judged, tabulated.

A study is resumable: each concept is a file of its own, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from inspect import getclosurevars, isfunction, signature
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept
from lenskit.enrichment import Enrichment, enrich
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import hard_labels, soft_labels
from lenskit.models import model_fingerprint
from lenskit.prompts import build_prompts
from lenskit.scoring import Judge, grammar_judge, steerability
from lenskit.selector import TokenSelection, fixed_token, select_tokens
from lenskit.vectors import (
    ConceptVectors,
    Logistic,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
    Ridge,
    SoftCovariance,
    fit_vectors,
    split,
)

LEARNERS: Mapping[str, Callable[[], object]] = MappingProxyType(
    {
        "rfm": RecursiveFeatureMachine,
        "ridge": Ridge,
        "logistic": Logistic,
        "covariance": SoftCovariance,
        "mean difference": MeanDifference,
        "pca": PrincipalComponent,
    }
)
LABELS: Mapping[str, Callable[[Capture, TokenSelection], Float[Tensor, "prompt layer"]]] = (
    MappingProxyType({"soft": soft_labels, "hard": hard_labels})
)
COEFFICIENTS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13)
CONTROLS = ("unsteered", "prompted", "random vector", "shuffled labels")
KEYS = ["token", "labels", "learner", "blocks", "control"]


@dataclass(frozen=True)
class Variant:
    """One way to make a concept vector and to apply it.

    ``token``: "attention" (Eq. 3) or a fixed offset such as "-1". ``labels``: "soft" (Eq. 4) or
    "hard". ``learner``: a key of the study's learners. ``blocks``: "all", "top4", "bottom4",
    "random4" by enrichment, or block numbers such as "4,5,6". ``control``: empty, or one of
    ``CONTROLS``.
    """

    token: str = "attention"
    labels: str = "soft"
    learner: str = "rfm"
    blocks: str = "all"
    control: str = ""


def variants(
    *,
    tokens: Iterable[str | int] = ("attention",),
    labels: Iterable[str] = ("soft",),
    learners: Iterable[str] = ("rfm",),
    blocks: Iterable[str] = ("all",),
    controls: Iterable[str] = CONTROLS,
) -> tuple[Variant, ...]:
    """Every combination, and the controls of the first one."""
    combined = [
        Variant(str(t), y, name, b) for t, y, name, b in product(tokens, labels, learners, blocks)
    ]
    if not combined:
        raise ValueError("tokens, labels, learners and blocks must each name at least one choice")
    return (*combined, *(replace(combined[0], control=control) for control in controls))


@dataclass(frozen=True)
class Study:
    """``answers``: a tidy table with a row for each concept, variant, coefficient and question."""

    answers: pd.DataFrame

    @cached_property
    def concepts(self) -> pd.DataFrame:
        """A row for each concept and variant: ``best`` and ``held_out`` steerability (0 to 1)."""
        rows = []
        keys = ["concept_class", "concept", *KEYS]
        for key, group in self.answers.groupby(keys, sort=False):
            table = group.pivot_table(index="coefficient", columns="question", values="score")
            found = steerability(torch.tensor(table.to_numpy()), list(table.index))
            rows.append(
                dict(zip(keys, key, strict=True))
                | {
                    "best": found.best,
                    "held_out": found.held_out,
                    "coefficient": table.index[found.coefficient],
                }
            )
        return pd.DataFrame(rows)

    def compare(self, by: Sequence[str] = KEYS) -> pd.DataFrame:
        """Means over concepts with their standard errors, a row for each value of ``by``."""
        groups = self.concepts.groupby(list(by), sort=False)[["best", "held_out"]]
        table = groups.mean().join(groups.sem().add_suffix(" ±"))
        return table.join(groups.size().rename("concepts")).reset_index()


@dataclass(frozen=True)
class _Workbench:
    """What the variants of one concept share, each part computed at most once."""

    model: TransformerBridge
    concept: Concept
    prompts: int
    seed: int
    learners: Mapping[str, Callable[[], object]]

    @cached_property
    def capture(self) -> Capture:
        prompts = build_prompts(self.model, self.concept, number=self.prompts, seed=self.seed)
        return capture(self.model, prompts, progress=False)

    @cached_property
    def enrichment(self) -> Enrichment:
        number = min(100, self.prompts)
        paired = build_prompts(
            self.model, self.concept, number=number, layout="paired", seed=self.seed
        )
        tokens = self.selection("attention")
        return enrich(self.model, paired, tokens, seed=self.seed, progress=False)

    @cached_property
    def _vectors(self) -> dict[tuple, ConceptVectors]:
        return {}

    def selection(self, token: str) -> TokenSelection:
        return (
            select_tokens(self.capture)
            if token == "attention"
            else fixed_token(self.capture, int(token))
        )

    def blocks(self, spec: str) -> tuple[int, ...] | None:
        if spec == "all":
            return None
        for how in ("top", "bottom", "random"):
            if spec.startswith(how):
                k = int(spec.removeprefix(how))
                if how == "random":
                    return self.enrichment.random(k, seed=self.seed)
                return self.enrichment.top(k) if how == "top" else self.enrichment.bottom(k)
        return tuple(int(block) for block in spec.split(","))

    def vectors(self, variant: Variant) -> ConceptVectors | None:
        if variant.control in ("unsteered", "prompted"):
            return None
        key = (variant.token, variant.labels, variant.learner, variant.control)
        if key not in self._vectors:
            self._vectors[key] = self._fit(variant)
        return self._vectors[key]

    def _fit(self, variant: Variant) -> ConceptVectors:
        tokens = self.selection(variant.token)
        labels = LABELS[variant.labels](self.capture, tokens)
        # Concepts of one study must not share their draws.
        own = f"{self.seed}/{self.concept.concept_class}/{self.concept.name}".encode()
        draw = int.from_bytes(hashlib.sha256(own).digest()[:4])
        generator = torch.Generator().manual_seed(draw)
        if variant.control == "shuffled labels":
            labels = _shuffled(labels, generator)
        learner = self.learners[variant.learner]()
        if variant.control != "random vector":
            return fit_vectors(
                self.capture, tokens, labels, learner=learner, seed=self.seed, progress=False
            )
        # Norms and provenance as usual; only the directions are drawn.
        fitted = self.vectors(replace(variant, control=""))
        assert fitted is not None
        drawn = torch.randn(fitted.directions.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        return replace(fitted, directions=drawn, learner="random vector")


def _shuffled(
    labels: Float[Tensor, "prompt layer"], generator: torch.Generator
) -> Float[Tensor, "prompt layer"]:
    """The labels in another order; with few prompts, one that leaves something to learn from."""
    train = split(len(labels))
    for _ in range(100):
        drawn = labels[torch.randperm(len(labels), generator=generator)]
        if all(bool((part != part[:1]).any(0).all()) for part in (drawn[:train], drawn[train:])):
            break
    return drawn


def study_concept(
    model: TransformerBridge,
    concept: Concept,
    variants: Sequence[Variant],
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    relative: bool = True,
    prompts: int = 400,
    judge: Judge = grammar_judge,
    learners: Mapping[str, Callable[[], object]] = LEARNERS,
    max_new_tokens: int = 50,
    batch_size: int = 256,
    seed: int = 0,
) -> list[dict]:
    """Tidy rows of one concept: every variant, coefficient and test question, answered and judged.

    Raises ValueError for a concept with fewer than three test questions: two choose the
    coefficient, and the others are scored.
    """
    if len(concept.questions) < 3:
        raise ValueError(
            f"concept {concept.name!r} has {len(concept.questions)} questions, and three are the "
            "fewest; give Concept(questions=...)"
        )
    bench = _Workbench(model, concept, prompts, seed, learners)
    rows: list[dict] = []
    for spec in dict.fromkeys(variant.blocks for variant in variants):
        planned = []
        for variant in (v for v in variants if v.blocks == spec):
            still = variant.control in ("unsteered", "prompted")
            vectors = bench.vectors(variant)
            prefix = concept.prefix if variant.control == "prompted" else ""
            for coefficient, question in product(
                [0.0] if still else coefficients, concept.questions
            ):
                row = SteeringRow(question, vectors, coefficient, prefix)
                planned.append((variant, row))
        texts = generate_steered(
            model,
            [row for _, row in planned],
            blocks=bench.blocks(spec),
            relative=relative,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for (variant, row), text in zip(planned, texts, strict=True):
            verdict = judge(concept, row.question, text)
            rows.append(
                {"concept_class": concept.concept_class or "custom", "concept": concept.name}
                | asdict(variant)
                | {"coefficient": row.coefficient, "question": row.question, "answer": str(text)}
                | {"score": verdict.score, "reason": verdict.reason}
            )
    return rows


def run_study(
    model: TransformerBridge,
    concepts: Iterable[Concept],
    variants: Sequence[Variant] = variants(),  # noqa: B008 - a constant
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **options,
) -> Study:
    """Run ``study_concept`` over concepts; ``options`` are its own.

    With ``out`` each finished concept is kept in that folder, and a study that was stopped goes on
    from there. Raises ValueError when the folder belongs to a study with other settings or model,
    or when two concepts share class and name.
    """
    concepts = distinct(concepts)
    folder = None if out is None else _open(Path(out), model, variants, options)
    rows: list[dict] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar:
        task = bar.add_task("study", total=len(concepts))
        for concept in concepts:
            bar.update(task, description=f"{concept.concept_class or 'custom'}: {concept.name}")
            file = folder and _file(folder, concept)
            if file and file.exists():
                rows += json.loads(file.read_text())
            else:
                found = study_concept(model, concept, variants, **options)
                rows += found
                if file:
                    _write(file, found)
            bar.advance(task)
    return Study(pd.DataFrame(rows))


def distinct(concepts: Iterable[Concept]) -> list[Concept]:
    """The concepts of a study; raises ValueError for none, or two of the same class and name."""
    concepts = list(concepts)
    names = [(c.concept_class, c.name) for c in concepts]
    if not concepts or len(set(names)) < len(names):
        raise ValueError(f"concepts must be at least one, and differ in class or name: {names}")
    return concepts


def finished(out: str | Path, concepts: Iterable[Concept]) -> list[Concept]:
    """Those concepts whose part of the study the folder ``out`` holds."""
    return [concept for concept in concepts if _file(Path(out), concept).exists()]


def read_study(out: str | Path, concepts: Iterable[Concept]) -> Study:
    """The finished study of these concepts that the folder ``out`` holds.

    Raises ValueError where a concept is still to be done.
    """
    concepts = list(concepts)
    files = [_file(Path(out), concept) for concept in concepts]
    left = [c.name for c, file in zip(concepts, files, strict=True) if not file.exists()]
    if left:
        raise ValueError(f"out={str(out)!r} does not hold {', '.join(left)} yet")
    return Study(pd.DataFrame([row for file in files for row in json.loads(file.read_text())]))


def _file(folder: Path, concept: Concept) -> Path:
    # Concepts of one's own may share a name: another prefix or question is another file.
    digest = hashlib.sha256("\n".join((concept.prefix, *concept.questions)).encode())
    words = [concept.concept_class or "custom", concept.name]
    tidy = ("".join(c if c.isalnum() else "-" for c in word) for word in words)
    return folder / ".".join((*tidy, digest.hexdigest()[:8], "json"))


def _write(file: Path, value: object) -> None:
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


def _open(
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
        _write(file, settings)
    elif json.loads(file.read_text()) != settings:
        raise ValueError(
            f"out={str(folder)!r} holds a study with other settings; choose another folder, "
            "or remove that one to start again"
        )
    return folder
