"""Why does a vector not steer? What its failure looks like, the likely cause, and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import pandas as pd
import torch

from lenskit._arguments import block_numbers
from lenskit._display import Displayed, quoted
from lenskit.capture import capture
from lenskit.concepts import Concept
from lenskit.prompts import build_prompts
from lenskit.study.bench import in_blocks
from lenskit.study.divergence import (
    Unsteered,
    calibrate,
    divergence,
    neutral_questions,
    unsteered,
)
from lenskit.study.lift import Told, lift, told
from lenskit.vectors import ConceptVectors, fit_vectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Cause: TypeAlias = Literal[
    "works",
    "too little",
    "too much",
    "wrong sign",
    "wrong block",
    "wrong token",
    "weak prefix",
    "unknown",
]
# A vector that does less than this share of what the prefix does is taken to fail.
WORKS = 0.25
# Nats a token that the prefix must make of its own answers for anything to be seen.
WEAKEST = 0.1
_STEPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_QUESTIONS = 4
_BLOCKS = 8

_SAID: Mapping[str, str] = {
    "works": "steering does what the prefix does",
    "too little": "the direction is right, but it is added too weakly to show",
    "too much": "the direction is right, but it is added so strongly that the answers suffer",
    "wrong sign": "the vector steers the other way: use the negative",
    "wrong block": "the concept can be steered, but not where this vector acts",
    "wrong token": "other vectors steer in the same blocks, so these directions are not the "
    "concept's: they were read at the wrong token, or are of something else",
    "weak prefix": "the prefix itself hardly changes the model's answers, so there is nothing that "
    "its vector could do",
    "unknown": "neither this vector nor one fitted anew steers the concept in any block",
}


@dataclass(frozen=True, repr=False)
class Diagnosis(Displayed):
    """The likely ``cause``, with the signatures that it was read from.

    ``coefficients``: from which to which to try, in the unit of those of ``steer``; ``None`` where
    none helps. ``blocks``: those in which vectors fitted anew do more, or ``None``. ``table``: for
    each coefficient tried the ``lift`` (how much of what the prefix does) and the ``divergence``
    (nats a token on neutral questions). ``reference``: the best lift of vectors fitted anew in the
    same blocks, in all and in each alone. ``gap``: what the prefix makes of its answers, in nats a
    token.
    """

    cause: Cause
    coefficients: tuple[float, float] | None
    blocks: tuple[int, ...] | None
    table: pd.DataFrame
    reference: Mapping[str, float]
    gap: float

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _headline(self) -> str:
        return f"Diagnosis: {self.cause}"

    def _rows(self) -> dict[str, object]:
        best = self.table.loc[self.table["lift"].idxmax()] if len(self.table) else None
        shown: dict[str, object] = {"because": _SAID[self.cause]}
        if self.coefficients:
            low, high = self.coefficients
            shown["coefficients to try"] = f"{low:.3g} to {high:.3g}"
        if self.blocks:
            shown["blocks to try"] = quoted(self.blocks)
        if best is not None:
            shown["largest lift"] = f"{best['lift']:.2f}, at {best['coefficient']:.3g}"
        shown["fitted anew"] = ", ".join(f"{k}: {v:.2f}" for k, v in self.reference.items())
        return shown | {"the prefix makes": f"{self.gap:.2f} nats a token"}


def diagnose(
    model: TransformerBridge,
    vectors: ConceptVectors,
    coefficient: float | None = None,
    *,
    blocks: Iterable[int] | None = None,
    concept: Concept | None = None,
    relative: bool | None = None,
    prompts: int = 40,
    statements: Sequence[str] | None = None,
    max_new_tokens: int = 30,
    seed: int = 0,
    batch_size: int = 64,
) -> Diagnosis:
    """The likely cause why vectors do not steer, and a range of coefficients to try.

    The signature is the *lift*: how much likelier steering makes the answers that the model gives
    after the prefix, as a share of what the prefix does. It is measured over coefficients around
    the one that moves the model by half a nat a token, of both signs. Where no coefficient gives a
    quarter, ``prompts`` are captured and vectors fitted anew: if these lift in the same blocks, the
    directions are wrong (token); if only in others, the blocks are. No judge is asked.

    ``coefficient`` and ``blocks``: those that were used; without the first only the direction is
    judged. ``concept``: by default that of the vectors; its questions are asked, or neutral ones
    where it has none, and answered by ``max_new_tokens`` at most. Raises ValueError for vectors of
    another model, or that are zero in all blocks.

    >>> found = lk.diagnose(model, vectors, coefficient=-0.05)
    >>> found.cause in ("wrong sign", "weak prefix", "wrong token", "unknown")
    True
    """
    vectors.check_model(model)
    chosen = block_numbers("blocks", blocks, len(vectors))
    vectors = in_blocks(vectors, chosen)
    acting = vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if not acting:
        raise ValueError(f"vectors are zero in blocks {list(chosen)}, so they steer nothing")
    if coefficient is not None and not math.isfinite(coefficient):
        raise ValueError(f"coefficient must be finite, got {coefficient}")
    own = vectors.concept if concept is None else concept
    asked = own.questions or neutral_questions(_QUESTIONS)
    written = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = told(model, own.prefix, asked, **written)
    if answers.gap < WEAKEST:
        nothing = pd.DataFrame(columns=["coefficient", "lift", "divergence"])
        return Diagnosis("weak prefix", None, None, nothing, {}, answers.gap)
    base = unsteered(model, neutral_questions(_QUESTIONS), **written)
    probe = _Probe(model, answers, base, relative, batch_size)
    table = probe.curve(vectors, coefficient)
    positive, negative = table[table["coefficient"] > 0], table[table["coefficient"] < 0]
    most, least = positive["lift"].max(), negative["lift"].max()
    if most >= WORKS and most >= least:
        span = _range(positive)
        return Diagnosis(_strength(coefficient, span), span, None, table, {}, answers.gap)
    if least >= WORKS:
        low, high = _range(negative.assign(coefficient=-negative["coefficient"]))
        cause: Cause = "wrong sign"
        if coefficient is not None and coefficient < 0:
            cause = _strength(-coefficient, (low, high))
        return Diagnosis(cause, (-high, -low), None, table, {}, answers.gap)
    number = prompts if statements is None else min(prompts, len(statements) // 2 * 2)
    made = capture(
        model,
        build_prompts(model, own, number=number, statements=statements, seed=seed),
        progress=False,
    )
    fitted = fit_vectors(made, seed=seed, progress=False)
    every = len(fitted)
    some = sorted({round(i * (every - 1) / max(1, _BLOCKS - 1)) for i in range(_BLOCKS)})
    tried = {"same blocks": acting, "all blocks": list(range(every))}
    tried |= {f"block {block}": [block] for block in some}
    lifts = probe.best([in_blocks(fitted, each) for each in tried.values()])
    reference = dict(zip(tried, lifts, strict=True))
    if reference["same blocks"] >= WORKS:
        return Diagnosis("wrong token", None, None, table, reference, answers.gap)
    best = max(reference, key=reference.__getitem__)
    cause = "wrong block" if reference[best] >= WORKS else "unknown"
    better = tuple(tried[best]) if cause == "wrong block" else None
    return Diagnosis(cause, None, better, table, reference, answers.gap)


@dataclass(frozen=True)
class _Probe:
    """Lifts of vectors over coefficients around the one that is calibrated."""

    model: TransformerBridge
    answers: Told
    base: Unsteered
    relative: bool | None
    batch_size: int

    def curve(self, vectors: ConceptVectors, given: float | None) -> pd.DataFrame:
        """Lift and divergence at coefficients of both signs, and at the one given."""
        (found,) = calibrate(self.model, [vectors], self.base, **self._options)
        middle = found.coefficient if found.reached else 1.0
        tried = [middle * step for step in _STEPS]
        tried += [-each for each in tried]
        if given and given not in tried:
            tried.append(given)
        several = [vectors] * len(tried)
        lifts = lift(self.model, self.answers, several, tried, **self._options)
        moved = divergence(self.model, self.base, several, tried, **self._options)
        table = pd.DataFrame({"coefficient": tried, "lift": lifts, "divergence": moved})
        return table.sort_values("coefficient", ignore_index=True).astype(float)

    def best(self, ways: Sequence[ConceptVectors]) -> list[float]:
        """The largest lift of each over positive coefficients."""
        found = calibrate(self.model, list(ways), self.base, **self._options)
        middles = [each.coefficient if each.reached else 1.0 for each in found]
        pairs = [(way, c * s) for way, c in zip(ways, middles, strict=True) for s in _STEPS]
        lifts = lift(
            self.model, self.answers, [v for v, _ in pairs], [c for _, c in pairs], **self._options
        )
        return torch.nan_to_num(lifts, nan=-math.inf).view(len(ways), -1).amax(dim=1).tolist()

    @property
    def _options(self) -> dict:
        return {"relative": self.relative, "batch_size": self.batch_size}


def _range(table: pd.DataFrame) -> tuple[float, float]:
    """The coefficients around the best one whose lift is at least half of its."""
    own = table.sort_values("coefficient", ignore_index=True)
    best = int(own["lift"].idxmax())
    enough = (own["lift"] >= own["lift"].max() / 2).tolist()
    low = high = best
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < len(own) - 1 and enough[high + 1]:
        high += 1
    return float(own.loc[low, "coefficient"]), float(own.loc[high, "coefficient"])


def _strength(coefficient: float | None, span: tuple[float, float]) -> Cause:
    if coefficient is None:
        return "works"
    if coefficient < 0:
        return "wrong sign"
    low, high = span
    return "too little" if coefficient < low else "too much" if coefficient > high else "works"
