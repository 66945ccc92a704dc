"""One concept's part of a study: vectors made in several ways, steered, judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept
from lenskit.enrichment import Enrichment, enrich
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import find_labels
from lenskit.prompts import PromptSet, build_prompts, with_separator
from lenskit.recipes import Recipe
from lenskit.scoring import Judge, as_verdict, grammar_judge
from lenskit.selector import TokenSelection, find_tokens
from lenskit.study.ways import Variant, settings_of
from lenskit.vectors import ConceptVectors, fit_vectors, split


@dataclass(frozen=True)
class _Workbench:
    """What the variants of one concept share, each part computed at most once."""

    model: TransformerBridge
    concept: Concept
    prompts: int
    seed: int
    learners: Mapping[str, Callable[[], object]]
    recipe: Recipe
    statements: Sequence[str] | None

    @cached_property
    def capture(self) -> Capture:
        return capture(self.model, self._prompts(self.prompts, "split"), progress=False)

    def _prompts(self, number: int, layout: Literal["split", "paired"]) -> PromptSet:
        if self.statements is not None:
            number = min(number, len(self.statements) // 2 * 2)
        prompts = build_prompts(
            self.model,
            self.concept,
            number=number,
            layout=layout,
            statements=self.statements,
            seed=self.seed,
        )
        return with_separator(self.model, prompts) if self.recipe.separator else prompts

    @cached_property
    def enrichment(self) -> Enrichment:
        paired = self._prompts(min(100, self.prompts), "paired")
        tokens = self.selection("attention")
        return enrich(self.model, paired, tokens, seed=self.seed, progress=False)

    @cached_property
    def _vectors(self) -> dict[tuple, ConceptVectors]:
        return {}

    def selection(self, token: str) -> TokenSelection:
        return find_tokens(self.capture, token)

    def blocks(self, spec: str) -> tuple[int, ...] | None:
        if spec == "all":
            return None
        if spec.startswith("from"):
            return tuple(range(int(spec.removeprefix("from")), self.model.cfg.n_layers))
        for how in ("top", "bottom", "random"):
            if spec.startswith(how):
                k = int(spec.removeprefix(how))
                if how == "random":
                    return self.enrichment.random(k, seed=own_seed(self.concept, self.seed))
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
        labels = find_labels(self.capture, tokens, variant.labels)
        generator = torch.Generator().manual_seed(own_seed(self.concept, self.seed))
        if variant.control == "shuffled labels":
            labels = _shuffled(labels, generator)
        if variant.control == "balanced shuffle":
            labels = _balanced(labels, self.capture.prompts.has_prefix, generator)
        learner = self.learners[variant.learner]()
        if variant.control != "random vector":
            return fit_vectors(
                self.capture,
                tokens,
                labels,
                learner=learner,
                recipe=self.recipe,
                seed=self.seed,
                progress=False,
            )
        # Norms and provenance as usual; only the directions are drawn.
        fitted = self.vectors(replace(variant, control=""))
        assert fitted is not None
        drawn = torch.randn(fitted.directions.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        return replace(fitted, directions=drawn, learner="random vector")


def own_seed(concept: Concept, seed: int) -> int:
    """A seed of the concept's own: the concepts of one study must not share their draws."""
    own = f"{seed}/{concept.concept_class}/{concept.name}".encode()
    return int.from_bytes(hashlib.sha256(own).digest()[:4])


def _shuffled(
    labels: Float[Tensor, "prompt layer"], generator: torch.Generator
) -> Float[Tensor, "prompt layer"]:
    """The labels in another order; with few prompts, one that leaves something to learn from."""
    return _learnable(lambda: labels[torch.randperm(len(labels), generator=generator)])


def _balanced(
    labels: Float[Tensor, "prompt layer"],
    prefixed: Bool[Tensor, " prompt"],
    generator: torch.Generator,
) -> Float[Tensor, "prompt layer"]:
    """The labels in an order that tells nothing of the prefix: of each two that are alike, one
    goes to a prompt with it and one to a prompt without."""
    pairs = labels.sort(dim=0).values.unflatten(0, (-1, 2))  # as many have a prefix as have none
    groups = torch.stack([prefixed.nonzero()[:, 0], (~prefixed).nonzero()[:, 0]])

    def draw() -> Tensor:
        drawn = torch.empty_like(labels)
        for layer in range(labels.shape[1]):
            flipped = torch.rand(pairs.shape[:2], generator=generator).argsort(1)
            own = pairs[:, :, layer].gather(1, flipped)
            for group, column in zip(groups, own.T, strict=True):
                drawn[group[torch.randperm(len(group), generator=generator)], layer] = column
        return drawn

    return _learnable(draw)


def _learnable(draw: Callable[[], Tensor]) -> Tensor:
    """A draw of labels whose training and validation parts both differ among themselves."""
    for _ in range(100):
        drawn = draw()
        train = split(len(drawn))
        if all(bool((part != part[:1]).any(0).all()) for part in (drawn[:train], drawn[train:])):
            break
    return drawn


def study_concept(
    model: TransformerBridge,
    concept: Concept,
    variants: Sequence[Variant] | Variant | None = None,
    *,
    recipe: Recipe | str | None = None,
    coefficients: Sequence[float] | float | None = None,
    relative: bool | None = None,
    prompts: int = 400,
    statements: Sequence[str] | None = None,
    judge: Judge = grammar_judge,
    learners: Mapping[str, Callable[[], object]] | None = None,
    max_new_tokens: int = 50,
    batch_size: int = 256,
    seed: int = 0,
) -> list[dict]:
    """Tidy rows of one concept: every variant, coefficient and test question, answered and judged.

    Variants, coefficients, whether these are relative, and learners are the ``recipe``'s where
    they are not given (``lk.recipes``). ``statements``: those of the prompts, where they are not
    the grammar's; fewer than ``prompts`` make as many prompts. A judge may return a Verdict, a
    bool, or a number from 0 to 1.

    Raises ValueError for a concept with fewer than three test questions: two choose the
    coefficient, and the others are scored.

    >>> options = {"coefficients": 0.04, "prompts": 40, "max_new_tokens": 3}
    >>> rows = lk.study_concept(model, concept, lk.Variant(), **options)
    >>> [row["question"] for row in rows] == list(concept.questions)
    True
    """
    if len(concept.questions) < 3:
        raise ValueError(
            f"concept {concept.name!r} has {len(concept.questions)} questions, and three are the "
            "fewest; give Concept(questions=...)"
        )
    given = {"recipe": recipe, "coefficients": coefficients, "relative": relative}
    variants, settings = settings_of(variants, given | {"learners": learners})
    coefficients, relative = settings["coefficients"], settings["relative"]
    bench = _Workbench(
        model, concept, prompts, seed, settings["learners"], settings["recipe"], statements
    )
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
            verdict = as_verdict(judge(concept, row.question, text))
            rows.append(
                {"concept_class": concept.concept_class or "custom", "concept": concept.name}
                | asdict(variant)
                | {"coefficient": row.coefficient, "question": row.question, "answer": str(text)}
                | {"score": verdict.score, "reason": verdict.reason}
            )
    return rows
