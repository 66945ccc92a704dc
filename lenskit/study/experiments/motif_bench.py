"""One planted motif: its prompts as ids, its vectors, and what steering with them writes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture, capture
from lenskit.enrichment import Enrichment, enrich
from lenskit.generation import generate_ids
from lenskit.labels import aurocs, gating_labels, rank_correlations, soft_labels
from lenskit.models import load_model
from lenskit.prompts import PromptSet, prompts_from_ids
from lenskit.scoring import steerability
from lenskit.selector import TokenSelection, select_tokens
from lenskit.steering import steer
from lenskit.study.bench import in_blocks
from lenskit.study.experiments.cells import quietly
from lenskit.study.experiments.motifs import (
    CLOSING,
    LETTERS,
    SIGNS,
    Motifs,
    Sequence4,
    right,
)
from lenskit.study.experiments.ways import ANOTHER, steered_blocks
from lenskit.vectors import ConceptVectors, fit_vectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FIRST = "token by attention"


def motif_model(hf_model: Any) -> TransformerBridge:
    """A model of such sequences with hooks; its tokenizer names ids, and nothing asks it."""
    return load_model(hf_model=hf_model, tokenizer=_signs(), check=False)


def answered_rightly(
    model: TransformerBridge, world: Motifs, *, number: int = 120, seed: int = 0
) -> pd.DataFrame:
    """The share of right answers by what was planted, with the number of sequences."""
    draw = random.Random(f"model {seed}")
    rows = [world.planted(draw, None) for _ in range(number // 3)]
    rows += [world.planted(draw, i % len(world.motifs)) for i in range(number)]
    written = generate_ids(model, [row.ids for row in rows], max_new_tokens=len(rows[0].answer))
    table = pd.DataFrame(
        {
            "planted": [
                "no motif" if row.place is None else "active" if row.active else "inactive"
                for row in rows
            ],
            "right": [own == row.answer for own, row in zip(written, rows, strict=True)],
        }
    )
    grouped = table.groupby("planted", sort=False)["right"]
    return pd.DataFrame({"right": grouped.mean(), "sequences": grouped.size()}).reset_index()


@dataclass(frozen=True)
class MotifBench:
    """One motif: its prompts, capture, labels and vectors, and answers to its test prompts."""

    model: TransformerBridge
    world: Motifs
    motif: int
    number: int
    tests: int
    seed: int

    @property
    def name(self) -> str:
        return "".join(SIGNS[letter] for letter in self.world.motifs[self.motif])

    @property
    def about(self) -> dict[str, str]:
        return {"concept_class": "motifs", "concept": self.name}

    @cached_property
    def pairs(self) -> list[Sequence4]:
        """With the motif and without, in turns."""
        draw = random.Random(f"prompts {self.seed} {self.motif}")
        return [each for _ in range(self.number // 2) for each in self.world.pair(draw, self.motif)]

    @cached_property
    def prompts(self) -> PromptSet:
        return prompts_from_ids(
            self.model,
            self.name,
            [each.ids for each in self.pairs],
            prefixes=[each.place for each in self.pairs],
            candidates=len(CLOSING),
            pair=[i ^ 1 for i in range(self.number)],
        )

    @cached_property
    def capture(self) -> Capture:
        return capture(self.model, self.prompts, progress=False)

    @cached_property
    def tokens(self) -> TokenSelection:
        return select_tokens(self.capture)

    @cached_property
    def enrichment(self) -> Enrichment:
        return enrich(self.model, self.prompts, self.tokens, seed=self.seed, progress=False)

    @cached_property
    def vectors(self) -> ConceptVectors:
        return self._fit("attention")

    def _fit(self, token: str, labels: Any = "hard") -> ConceptVectors:
        return quietly(lambda: fit_vectors(self.capture, token, labels, progress=False))

    def ways(self, other: MotifBench) -> Mapping[str, ConceptVectors | None]:
        """Vectors by the way's name; ``None`` where a label could not be had."""
        own = self.vectors
        generator = torch.Generator().manual_seed(1000 * self.seed + self.motif)
        drawn = torch.randn(own.directions.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        order = torch.randperm(len(self.capture), generator=generator)

        def shuffled(captured: Capture, tokens: TokenSelection) -> Tensor:
            hard = captured.prompts.has_prefix.float()[order]
            return hard[:, None].expand(-1, captured.layers).clone()

        found: dict[str, ConceptVectors | None] = {FIRST: own}
        found |= {f"token -{i}": self._fit(f"-{i}") for i in range(1, len(CLOSING) + 1)}
        found["each closing token its own vector"] = self._fit("each")
        found["the most enriched block"] = in_blocks(own, self.enrichment.top(1))
        found["the least enriched block"] = in_blocks(own, self.enrichment.bottom(1))
        for kind in ("soft", "gating"):
            try:
                found[f"{kind} labels"] = self._fit("attention", kind)
            except ValueError:
                found[f"{kind} labels"] = None  # no attention varies
        found["random vector"] = replace(own, directions=drawn, learner="random vector")
        found["shuffled labels"] = self._fit("attention", shuffled)
        found[ANOTHER] = other.vectors
        return found

    def scores(self, budget: Sequence[float], other: MotifBench) -> dict[str, dict[str, float]]:
        """Both scores of every way."""
        draw = random.Random(f"tests {self.seed} {self.motif}")
        bare = [self.world.planted(draw, None) for _ in range(self.tests)]
        found: dict[str, dict[str, float]] = {}
        for name, vectors in self.ways(other).items():
            if vectors is None or not steered_blocks(vectors):
                continue
            each = [total / steered_blocks(vectors) for total in budget]
            score = steerability(self._right(bare, vectors, each), budget)
            found[name] = {"best": score.best, "held out": score.held_out}
        plain = float(self._right(bare).mean())
        prompted = float(self._right(self._active(draw)).mean())
        for name, value in (("unsteered", plain), ("prefix in the prompt", prompted)):
            found[name] = {"best": value, "held out": value}
        return found

    def _active(self, draw: random.Random) -> list[Sequence4]:
        found: list[Sequence4] = []
        while len(found) < self.tests:
            each = self.world.planted(draw, self.motif)
            found += [each] * each.active
        return found

    def _right(
        self,
        asked: Sequence[Sequence4],
        vectors: ConceptVectors | None = None,
        coefficients: Sequence[float] = (0.0,),
    ) -> Float[Tensor, "coefficient answer"]:
        """Which answers are the motif's, 1 or 0, at each coefficient."""
        ids = [each.ids for _ in coefficients for each in asked]
        length = len(asked[0].answer)
        if vectors is None:
            written = generate_ids(self.model, ids, max_new_tokens=length)
        else:
            rows = [each for each in coefficients for _ in asked]
            with steer(self.model, vectors, coefficient=rows, relative=True):
                written = generate_ids(self.model, ids, max_new_tokens=length)
        return right(self.world, self.motif, written).double().view(len(coefficients), -1)

    def followed(self) -> list[dict[str, Any]]:
        """How well labels follow the activity that was planted, over prompts with the motif."""
        prefixed = self.prompts.has_prefix
        active = torch.tensor([each.active for each in self.pairs])[prefixed]
        labels = {"soft": soft_labels(self.capture, self.tokens, constant="hard")}
        try:
            labels["gating"] = quietly(gating_labels, self.capture)[:, :1]
        except ValueError:
            pass  # no attention varies
        found = []
        for name, values in labels.items():
            scores = aurocs(values[prefixed], active).tolist()
            ranks = rank_correlations(values[prefixed], active.double()).tolist()
            for block, (score, rank) in enumerate(zip(scores, ranks, strict=True)):
                way = f"{name}, block {block}" if name == "soft" else name
                found.append(
                    {**self.about, "way": way, "AUROC": _known(score)}
                    | {"rank correlation": _known(rank)}
                )
        return found

    def blocks(self) -> list[dict[str, Any]]:
        """Enrichment and selected token, from the end, of each block."""
        offsets = self.tokens.offsets.tolist()
        scores = self.enrichment.scores.tolist()
        return [
            {**self.about, "way": f"block {block}", "enrichment": score, "selected token": offset}
            for block, (score, offset) in enumerate(zip(scores, offsets, strict=True))
        ]


def _known(value: float) -> float:
    return value if math.isfinite(value) else float("nan")


def _signs() -> Any:
    """A tokenizer whose tokens are the signs, since every model has to bring one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token=SIGNS[LETTERS[0]])
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SIGNS[0], unk_token=SIGNS[LETTERS[0]]
    )
