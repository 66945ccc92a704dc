"""Ways to say which blocks carry a concept, each a score for every block from a concept's bench."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.enrichment import Null, enrich
from lenskit.models import using
from lenskit.study.bench import own_seed
from lenskit.study.experiments.bench import Bench
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors, in_blocks

BlockScore = Callable[[Bench], Float[Tensor, " layer"]]


@dataclass(frozen=True)
class EnrichmentScore:
    """The share of heads and prompts whose attention to the prefix is significant (AGS)."""

    null: Null

    def __call__(self, bench: Bench) -> Float[Tensor, " layer"]:
        if self.null == "keys":
            return bench.enrichment.scores
        prompts = bench.paired.prompts
        prompts = prompts.rows(range(min(100, len(prompts))))
        tokens = bench.selection("attention")
        found = enrich(
            bench.model, prompts, tokens, null=self.null, seed=bench.seed, progress=False
        )
        return found.scores


def held_out_correlation(bench: Bench) -> Float[Tensor, " layer"]:
    """Correlation of the vector's projection with the labels of the validation prompts."""
    vectors = bench.vectors(Variant())
    assert vectors is not None
    return vectors.validation


def agreement(bench: Bench) -> Float[Tensor, " layer"]:
    """Mean cosine among the differences that the prefix makes to the same statements.

    At the attention-guided token, over all pairs of statements.
    """
    rows = bench.selection("attention").take(bench.paired.resid_post)
    own = bench.paired.prompts
    differences = rows[own.has_prefix] - rows[own.pair[own.has_prefix]]
    units = torch.nn.functional.normalize(differences, dim=-1)
    number = len(units)
    # The square of the sum holds each pair twice and each unit vector with itself.
    return (units.sum(dim=0).square().sum(dim=-1) - number) / (number * (number - 1))


@torch.no_grad()
def logit_lens(bench: Bench) -> Float[Tensor, " layer"]:
    """How often the stream after the block, unembedded, has the model's own next token on top.

    At the last token of the prompts with the prefix. Raises ValueError for a model without a final
    norm and an unembedding of the usual names.
    """
    model = bench.model
    if not (hasattr(model, "ln_final") and hasattr(model, "unembed")):
        raise ValueError("this model has no ln_final and unembed for a logit lens")
    states = bench.capture.resid_post[bench.capture.prompts.has_prefix, :, -1]
    weight = next(model.unembed.parameters())
    with using(model):
        tops = torch.stack(
            [
                model.unembed(model.ln_final(layer[None].to(weight.device, weight.dtype)))[0]
                .argmax(dim=-1)
                .cpu()
                for layer in states.unbind(dim=1)
            ]
        )
    return (tops == tops[-1]).float().mean(dim=1)


BLOCK_SCORES: Mapping[str, BlockScore] = MappingProxyType(
    {
        "enrichment": EnrichmentScore("keys"),
        "enrichment, windows": EnrichmentScore("windows"),
        "enrichment, paired": EnrichmentScore("paired"),
        "held-out correlation": held_out_correlation,
        "agreement of differences": agreement,
        "logit lens": logit_lens,
    }
)


@dataclass(frozen=True)
class Top:
    """The ``k`` blocks with the highest score, or the lowest; of equal ones the earlier first."""

    score: BlockScore
    k: int
    lowest: bool = False

    def __call__(self, bench: Bench) -> tuple[int, ...]:
        ranking = self.score(bench).argsort(descending=True, stable=True)
        kept = ranking[-self.k :] if self.lowest else ranking[: self.k]
        return tuple(sorted(kept.tolist()))


@dataclass(frozen=True)
class Drawn:
    """``k`` blocks drawn for each concept."""

    k: int

    def __call__(self, bench: Bench) -> tuple[int, ...]:
        blocks = range(bench.model.cfg.n_layers)
        drawn = random.Random(own_seed(bench.concept, bench.seed))
        return tuple(sorted(drawn.sample(blocks, self.k)))


@dataclass(frozen=True)
class Stretch:
    """``k`` blocks side by side, the first, the middle or the last ones."""

    where: Literal["early", "middle", "late"]
    k: int

    def __call__(self, bench: Bench) -> tuple[int, ...]:
        left = bench.model.cfg.n_layers - self.k
        first = {"early": 0, "middle": left // 2, "late": left}[self.where]
        return tuple(range(first, first + self.k))


@dataclass(frozen=True)
class InBlocks:
    """A variant's vectors at chosen blocks alone."""

    variant: Variant
    choose: Callable[[Bench], tuple[int, ...]]

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        vectors = bench.vectors(replace(self.variant, blocks="all"))
        return None if vectors is None else in_blocks(vectors, self.choose(bench))
