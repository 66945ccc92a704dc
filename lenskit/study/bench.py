"""What the variants of one concept share: prompts, capture, enrichment, and vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept
from lenskit.enrichment import Enrichment, enrich
from lenskit.labels import find_labels
from lenskit.prompts import PromptSet, build_prompts, with_separator
from lenskit.recipes import Recipe
from lenskit.selector import TokenSelection, find_tokens
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors, fit_vectors, split


@dataclass(frozen=True)
class Workbench:
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
                    return self.enrichment.random(k, seed=self.seed)
                return self.enrichment.top(k) if how == "top" else self.enrichment.bottom(k)
        return tuple(int(block) for block in spec.split(","))

    def steering(self, variant: Variant) -> ConceptVectors | None:
        """The variant's vectors, zero at the blocks that it leaves alone; None: not steered."""
        vectors = self.vectors(variant)
        blocks = None if vectors is None else self.blocks(variant.blocks)
        if vectors is None or blocks is None:
            return vectors
        number = self.model.cfg.n_layers
        if not blocks or not all(0 <= block < number for block in blocks):
            raise ValueError(
                f"blocks {variant.blocks!r} must be among 0 to {number - 1} for this model"
            )
        kept = torch.zeros(number, 1)
        kept[list(blocks)] = 1
        return replace(vectors, directions=vectors.directions * kept)

    def vectors(self, variant: Variant) -> ConceptVectors | None:
        """The variant's vectors at every block, fitted once for all that differ in blocks."""
        if variant.still:
            return None
        key = (variant.token, variant.labels, variant.learner, variant.control)
        if key not in self._vectors:
            self._vectors[key] = self._fit(variant)
        return self._vectors[key]

    def _fit(self, variant: Variant) -> ConceptVectors:
        tokens = self.selection(variant.token)
        labels = find_labels(self.capture, tokens, variant.labels)
        # Concepts of one study must not share their draws.
        own = f"{self.seed}/{self.concept.concept_class}/{self.concept.name}"
        digest = hashlib.sha256(own.encode("utf-8", "surrogatepass")).digest()
        draw = int.from_bytes(digest[:4])
        generator = torch.Generator().manual_seed(draw)
        if variant.control == "shuffled labels":
            labels = _shuffled(labels, generator)
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
