"""Sums and multiples of concept vectors: what ``2 * v - w`` is, and what steering with it adds.

A multiple of ``ConceptVectors`` cannot be one: its directions have unit norm, and so do those of
every file. The sum of two cannot either, since each has residual norms of its own, the units of
relative coefficients. So both are kept as they were written: vectors, each with its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed, count, spread

if TYPE_CHECKING:
    from lenskit.vectors.storage import ConceptVectors

    Terms: TypeAlias = tuple[tuple[ConceptVectors, float], ...]


class Arithmetic:
    """``v + w``, ``v - w``, ``-v``, ``2 * v`` and ``v / 2``, for all that has ``terms``."""

    # NumPy's numbers leave ``number * v`` to us, instead of reading v as a sequence.
    __array_ufunc__ = None
    terms: Terms

    def __add__(self, other: Arithmetic) -> Combination:
        if not isinstance(other, Arithmetic):
            return NotImplemented
        return Combination((*self.terms, *other.terms))

    def __radd__(self, other: Any) -> Combination:
        # ``sum`` begins with 0.
        return Combination(self.terms) if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Arithmetic) -> Combination:
        return self + -other if isinstance(other, Arithmetic) else NotImplemented

    def __neg__(self) -> Combination:
        return self * -1

    def __mul__(self, number: Any) -> Combination:
        factor = _number(number)
        if factor is None:
            return NotImplemented
        return Combination(tuple((one, weight * factor) for one, weight in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Combination:
        factor = _number(number)
        if factor is None:
            return NotImplemented
        return Combination(tuple((one, weight / factor) for one, weight in self.terms))

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.terms[0][0].directions)

    def __getitem__(
        self, layer: int | slice
    ) -> Float[Tensor, "*candidate d_model"] | Float[Tensor, "layer *candidate d_model"]:
        """The vector of a block, or of a slice of blocks, in absolute units.

        Where a term has one for each closing token, what all terms add at each of these.
        """
        places = len(closing_of([one for one, _ in self.terms])[0])
        rows = [weight * one.directions[layer] for one, weight in self.terms]
        if places:
            axis = 1 if isinstance(layer, slice) else 0
            rows = [
                row if one.closing else row.unsqueeze(axis).expand(*row.shape[:axis], places, -1)
                for (one, _), row in zip(self.terms, rows, strict=True)
            ]
        return torch.stack(rows).sum(dim=0)


@dataclass(frozen=True, repr=False)
class Combination(Arithmetic, Displayed):
    """A weighted sum of concept vectors, which ``steer`` takes: ``Σ weight · vectors``.

    It is what arithmetic with ``ConceptVectors`` makes, and the same as a list of pairs:
    ``steer(model, 2 * v - w)`` equals ``steer(model, [(v, 2), (w, -1)])``. ``terms``: the vectors
    and their weights, each of them once. Blocks have no unit norm, so it has no file of its own:
    save its vectors.

    A vector for each closing token and one for all tokens add up too: each acts where it does.

    Raises ``ValueError`` for vectors of different models, numbers of blocks or closing tokens, and
    for a weight that is not finite.
    """

    terms: Terms

    def __post_init__(self) -> None:
        from lenskit.models import same_model

        merged: dict[int, tuple[ConceptVectors, float]] = {}
        for one, weight in self.terms:
            merged[id(one)] = one, merged.get(id(one), (one, 0.0))[1] + weight
        object.__setattr__(self, "terms", tuple(merged.values()))
        if not self.terms:
            raise ValueError("terms is empty; give at least one ConceptVectors with its weight")
        first = self.terms[0][0]
        for one, weight in self.terms:
            if not same_model(one.model, first.model):
                raise ValueError(
                    f"vectors of different models do not add up: {first.concept.name!r} was made "
                    f"with {first.model}, {one.concept.name!r} with {one.model}"
                )
            if _blocks(one) != _blocks(first):
                raise ValueError(
                    "vectors of different numbers of blocks do not add up: "
                    f"{first.concept.name!r} is [layer, d_model] = {list(first.directions.shape)}, "
                    f"{one.concept.name!r} is {list(one.directions.shape)}"
                )
            if not math.isfinite(weight):
                raise ValueError(f"the weight of vectors must be finite, got {weight}")
        closing_of([one for one, _ in self.terms])

    def _headline(self) -> str:
        return f"Combination of {count(len(self.terms), 'concept vector')}, {len(self)} blocks"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {
            f"term {i}": f"{weight:+.4g} × {one.concept.name!r}, {one.learner}"
            for i, (one, weight) in enumerate(self.terms[:12], start=1)
        }
        return shown | {"norms": spread(self[:].norm(dim=-1).flatten().tolist())}


def closing_of(vectors: Iterable[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and texts of the closing tokens that vectors are for; empty where none are for these.

    Raises ``ValueError`` where some are for other tokens than others.
    """
    placed = [one for one in vectors if getattr(one, "closing", ())]
    for one in placed:
        if one.closing != placed[0].closing:
            raise ValueError(
                "vectors of different closing tokens do not go together: those of "
                f"{placed[0].concept.name!r} are for {placed[0].candidates}, those of "
                f"{one.concept.name!r} for {one.candidates}; fit them on prompts of one template"
            )
    return (placed[0].closing, placed[0].candidates) if placed else ((), ())


def _blocks(vectors: ConceptVectors) -> tuple[int, int]:
    return len(vectors.directions), vectors.directions.shape[-1]


def _number(given: Any) -> float | None:
    if isinstance(given, Tensor) and given.ndim == 0:
        given = given.item()
    return None if isinstance(given, bool) or not isinstance(given, Real) else float(given)
