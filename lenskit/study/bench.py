"""What the variants of one concept share: prompts, capture, enrichment, and vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept
from lenskit.enrichment import Enrichment, enrich
from lenskit.labels import find_labels
from lenskit.prompts import PromptSet, build_prompts, with_separator
from lenskit.recipes import INCREMENTS, Recipe
from lenskit.selector import TokenSelection, find_tokens
from lenskit.study.clock import stage
from lenskit.study.look import Look, looked_at, settled
from lenskit.study.ways import Variant
from lenskit.vectors import LEARNERS, ConceptVectors, fit_vectors, in_blocks, split


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
        with stage("capture"):
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
        tokens = self.selection("attention")
        with stage("enrichment"):
            paired = self._prompts(min(100, self.prompts), "paired")
            return enrich(self.model, paired, tokens, seed=self.seed, progress=False)

    @cached_property
    def _vectors(self) -> dict[tuple, ConceptVectors]:
        return {}

    @cached_property
    def _same_labels(self) -> dict[str, Float[Tensor, "prompt layer"]]:
        """Labels that are the same at every token."""
        return {}

    @cached_property
    def _looks(self) -> dict[Variant, Look]:
        return {}

    def settled(self, variant: Variant) -> Variant:
        """The variant with the token and blocks that a look at this concept chooses."""
        if variant.settled:
            return variant
        asked = replace(variant, control="")
        if asked not in self._looks:
            recipe = open_recipe(asked, self.recipe)
            self._looks[asked] = settled(recipe, [looked(asked, self)], [self.concept.name])
        recipe = self._looks[asked].recipe
        return replace(variant, token=recipe.token, blocks=recipe.blocks)

    def selection(self, token: str) -> TokenSelection:
        return find_tokens(self.capture, token)

    def blocks(self, spec: str) -> tuple[int, ...] | None:
        if spec in ("all", INCREMENTS):
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

    def steering(self, variant: Variant) -> ConceptVectors | None:
        """The variant's vectors, zero at the blocks that it leaves alone; None: not steered."""
        variant = variant if variant.still else self.settled(variant)
        with stage("fit"):
            vectors = self.vectors(variant)
        blocks = None if vectors is None else self.blocks(variant.blocks)
        if vectors is None or blocks is None:
            return vectors
        return in_blocks(vectors, blocks, variant.blocks)

    def vectors(self, variant: Variant) -> ConceptVectors | None:
        """The variant's vectors at every block, fitted once for all that differ in blocks."""
        if variant.still:
            return None
        added = variant.blocks == INCREMENTS
        key = (variant.token, variant.labels, variant.learner, variant.control, added)
        if key not in self._vectors:
            self._vectors[key] = self._fit(variant)
        return self._vectors[key]

    def _fit(self, variant: Variant) -> ConceptVectors:
        learner = self.learners[variant.learner]()
        added = variant.blocks == INCREMENTS
        if variant.control != "random vector":
            return fit_vectors(
                self.capture,
                variant.token,
                partial(self._labels, variant),
                learner=learner,
                # Those of one block are taken from those of all.
                recipe=replace(
                    self.recipe, token=variant.token, blocks=INCREMENTS if added else "all"
                ),
                model=self.model,
                seed=self.seed,
                progress=False,
            )
        # Norms and provenance as usual; only the directions are drawn.
        fitted = self.vectors(replace(variant, control=""))
        assert fitted is not None
        drawn = torch.randn(fitted.directions.shape, generator=self._generator())
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        return replace(fitted, directions=drawn, learner="random vector")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(own_seed(self.concept, self.seed))

    def _labels(
        self, variant: Variant, captured: Capture, tokens: TokenSelection
    ) -> Float[Tensor, "prompt layer"]:
        """The variant's labels at a selection, shuffled alike for every one."""
        if variant.labels == "soft":
            labels = find_labels(captured, tokens, "soft")
        else:
            if variant.labels not in self._same_labels:
                with stage("labels"):
                    self._same_labels[variant.labels] = find_labels(
                        captured, tokens, variant.labels, self.model
                    )
            labels = self._same_labels[variant.labels]
        if variant.control == "shuffled labels":
            return _shuffled(labels, self._generator())
        if variant.control == "balanced shuffle":
            return _balanced(labels, captured.prompts.has_prefix, self._generator())
        return labels


def looked(variant: Variant, bench: Workbench) -> pd.DataFrame:
    """What a look at the concept of this bench finds (``looked_at``) for what a variant leaves
    open; several of them ``settled`` it."""
    captured, recipe = bench.capture, open_recipe(variant, bench.recipe)
    with stage("look"):
        return looked_at(bench.model, captured, recipe, seed=bench.seed)


def open_recipe(variant: Variant, recipe: Recipe) -> Recipe:
    """The recipe with what a variant names, and with that which the variant leaves open."""
    return replace(
        recipe,
        token=variant.token,
        labels=variant.labels,
        learner=variant.learner if variant.learner in LEARNERS else recipe.learner,
        blocks=variant.blocks,
    )


def own_seed(concept: Concept, seed: int) -> int:
    """A seed of the concept's own: the concepts of one study must not share their draws."""
    own = f"{seed}/{concept.concept_class}/{concept.name}".encode("utf-8", "surrogatepass")
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
