"""Linear algebra of the span of a few rows: its basis, leading eigenpairs, largest entry.

Every function takes several problems at once along leading dimensions and runs on the device of
its tensors. Nothing here forms a d x d matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DEPTH = 4
RESTARTS = 6
TINY = 1e-300


@dataclass(frozen=True)
class RowSpace:
    """The span of centred rows X = U S Qᵀ (thin SVD), for several blocks at once.

    ``whiten`` is U S⁻¹, so that Q = Xᵀ whiten; its columns are zero where S vanishes, which
    centring makes so for at least one. The Gram matrix and its eigenvectors are float64 whatever
    the precision of the caller: they square the condition number of the rows.
    """

    rows: Float[Tensor, "block n d"]
    gram: Float[Tensor, "block n n"]
    whiten: Float[Tensor, "block n r"]

    @classmethod
    def of(cls, rows: Float[Tensor, "block n d"]) -> RowSpace:
        """Centre the rows of each block and find the basis of their span."""
        rows = rows.double()
        rows = rows - rows.mean(-2, keepdim=True)
        gram = rows @ rows.mT
        values, vectors = torch.linalg.eigh(gram)
        rank = min(rows.shape[-2:])
        values, vectors = values[..., -rank:], vectors[..., -rank:]
        floor = 4 * rows.shape[-2] * torch.finfo(torch.float64).eps * values[..., -1:]
        inverse = torch.where(values > floor, values.clamp_min(TINY).rsqrt(), 0.0)
        return cls(rows, gram, vectors * inverse.unsqueeze(-2))

    def __getitem__(self, blocks: slice) -> RowSpace:
        return RowSpace(self.rows[blocks], self.gram[blocks], self.whiten[blocks])

    def basis(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "block d r"]:
        """Q, computed in ``dtype``."""
        return self.rows.to(dtype).mT @ self.whiten.to(dtype)


def orthonormal(
    block: Float[Tensor, "*batch k r"], against: Float[Tensor, "*batch m r"] | None = None
) -> Float[Tensor, "*batch k r"]:
    """Orthonormal rows that span ``block`` less the span of ``against``.

    Directions that vanish become zero rows: a rank-deficient block is no error. Twice is enough:
    the second pass removes what rounding left in the first. Small symmetric eigenproblems batch
    well on every device, where a batched QR may run one matrix at a time.
    """
    eps, tiny = torch.finfo(block.dtype).eps, torch.finfo(block.dtype).tiny
    for _ in range(2):
        if against is not None:
            block = block - (block @ against.mT) @ against
        block = block / block.norm(dim=-1, keepdim=True).clamp_min(tiny)
        values, vectors = torch.linalg.eigh(block @ block.mT)
        inverse = torch.where(values > 16 * eps, values.clamp_min(eps).rsqrt(), 0.0)
        block = (vectors * inverse.unsqueeze(-2)).mT @ block
    return block


@dataclass(frozen=True)
class LeadingPairs:
    """The first Ritz values of C = TᵀT, largest first, and their vectors as rows."""

    values: Float[Tensor, "problem k"]
    vectors: Float[Tensor, "problem k r"]

    @property
    def gap(self) -> Float[Tensor, " problem"]:
        """(λ₁ - λ₂) / λ₁: how well the first eigenvector is determined (0 where C = 0)."""
        return relative_gap(self.values[:, 0], self.values[:, 1:2].sum(-1))


def relative_gap(first: Float[Tensor, "*p"], second: Float[Tensor, "*p"]) -> Float[Tensor, "*p"]:
    """(first - second) / first, 0 where ``first`` is 0."""
    return torch.where(first > 0, (first - second) / first.clamp_min(TINY), 0.0)


def leading_pairs(
    factor: Float[Tensor, "problem n r"], start: Float[Tensor, "problem k r"]
) -> LeadingPairs:
    """Leading eigenpairs of C = TᵀT by block Krylov steps from ``start``, T = ``factor``.

    The first pair is accepted only where its residual is far below the gap to the second
    (eps^(2/3) of it, which bounds the angle to the eigenvector); what no restart brings there is
    left to a dense eigendecomposition. The other pairs, 2 k in all, are Ritz pairs only.

    Vectors are rows throughout: a product of few rows with a matrix is several times faster than
    that of the matrix with few columns.
    """
    width = 2 * start.shape[1]
    if min(factor.shape[1:]) <= 2 * width:
        return _dense(factor, width)
    tolerance = torch.finfo(factor.dtype).eps ** (2 / 3)
    todo = torch.arange(len(factor), device=factor.device)
    found, rest, block = None, factor, orthonormal(start)
    for _ in range(RESTARTS):
        pairs, accepted = _krylov(rest, block, tolerance)
        found = pairs if found is None else _assigned(found, todo, pairs)
        todo = todo[~accepted]
        if not len(todo):
            return found
        rest = factor[todo]
        block = orthonormal(pairs.vectors[~accepted, : start.shape[1]])
    return _assigned(found, todo, _dense(rest, width))


def _dense(factor: Float[Tensor, "problem n r"], width: int) -> LeadingPairs:
    values, vectors = torch.linalg.eigh(factor.mT @ factor)
    return LeadingPairs(values.flip(1)[:, :width].clamp_min(0), vectors.mT.flip(1)[:, :width])


def _assigned(found: LeadingPairs, where: Tensor, pairs: LeadingPairs) -> LeadingPairs:
    return LeadingPairs(
        found.values.index_copy(0, where, pairs.values),
        found.vectors.index_copy(0, where, pairs.vectors),
    )


def _krylov(
    factor: Float[Tensor, "problem n r"], block: Float[Tensor, "problem k r"], tolerance: float
) -> tuple[LeadingPairs, Bool[Tensor, " problem"]]:
    width = block.shape[1]
    basis, images = block, (block @ factor.mT) @ factor
    for _ in range(DEPTH - 1):
        block = orthonormal(images[:, -width:], basis)
        basis = torch.cat([basis, block], 1)
        images = torch.cat([images, (block @ factor.mT) @ factor], 1)
        projected = images @ basis.mT
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values = values.flip(1)[:, : 2 * width].clamp_min(0)
        rotation = rotation.mT.flip(1)[:, : 2 * width]
        vectors, first = rotation @ basis, rotation[:, :1] @ images
        residual = (first - values[:, :1, None] * vectors[:, :1]).norm(dim=-1).squeeze(1)
        accepted = residual <= tolerance * (values[:, 0] - values[:, 1])
        if accepted.all():
            break
    return LeadingPairs(values, vectors), accepted


def largest_entry(
    factor: Float[Tensor, "block setting n r"],
    basis: Float[Tensor, "block d r"],
    leverage: Float[Tensor, "block d"],
    small: Float[Tensor, "block setting k r"],
    rest: Float[Tensor, "block setting"],
) -> Float[Tensor, "block setting"]:
    """The largest entry of Q TᵀT Qᵀ, exactly: max_i ||T q_i||², q_i the rows of Q = ``basis``.

    The matrix is positive semidefinite, so its largest entry is on the diagonal. S = ``small`` is
    T projected on k of its left dimensions, so TᵀT = SᵀS + R with R positive semidefinite of
    trace ``rest``, and ||S q_i||² <= ||T q_i||² <= ||S q_i||² + ||R|| ||q_i||², where ||q_i||² is
    the ``leverage``. Only coordinates whose upper bound exceeds the best value found are evaluated.
    ||R|| is bounded by its trace and, where that excludes too few, by ||R²||^(1/2) (Frobenius).
    """
    if factor.is_cuda:
        # The full product costs less there than waiting for the host to read the bounds.
        maxima = [(t @ basis.mT).square().sum(-2).amax(-1) for t in factor.unbind(1)]
        return torch.stack(maxima, 1)
    best = []
    for t, q, weight, s, trace in zip(factor, basis, leverage, small, rest, strict=True):
        lower = (q @ s.flatten(0, 1).mT).unflatten(1, s.shape[:2]).square().sum(-1).mT
        parts = zip(t, lower, s, trace, strict=True)
        best += [_largest(t_, q, weight, low, s_, bound) for t_, low, s_, bound in parts]
    return torch.stack(best).view_as(rest)


def _largest(
    factor: Float[Tensor, "n r"],
    basis: Float[Tensor, "d r"],
    leverage: Float[Tensor, " d"],
    lower: Float[Tensor, " d"],
    small: Float[Tensor, "k r"],
    bound: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    margin = 64 * torch.finfo(factor.dtype).eps
    few = len(basis) // 8
    best, number = _best_within(factor, basis, lower + (1 + margin) * bound * leverage, few)
    if number > few:
        remainder = factor.mT @ factor - small.mT @ small
        bound = torch.linalg.matrix_norm(remainder @ remainder).sqrt() + margin * lower.sum()
        best, number = _best_within(factor, basis, lower + bound * leverage, few)
    return best if number <= few else _full_maximum(factor, basis)


def _squared_norms(factor: Float[Tensor, "n r"], rows: Float[Tensor, "m r"]) -> Float[Tensor, " m"]:
    return (factor @ rows.mT).square().sum(0)


def _best_within(
    factor: Float[Tensor, "n r"],
    basis: Float[Tensor, "d r"],
    upper: Float[Tensor, " d"],
    few: int,
    first: int = 16,
) -> tuple[Float[Tensor, ""], int]:
    """The largest value, valid where the number of coordinates that could exceed it is <= few."""
    order = upper.topk(min(first, len(upper))).indices
    best = _squared_norms(factor, basis[order]).max()
    candidates = (upper > best).nonzero().flatten()
    if first < len(candidates) <= few:
        best = _squared_norms(factor, basis[candidates]).max()
    return best, 0 if len(candidates) <= first else len(candidates)


def _full_maximum(factor: Float[Tensor, "n r"], basis: Float[Tensor, "d r"]) -> Float[Tensor, ""]:
    """All coordinates, in float32 first: only those within 1e-4 of the best could be it."""
    rough = _squared_norms(factor.float(), basis.float())
    return _squared_norms(factor, basis[rough >= (1 - 1e-4) * rough.max()]).max()
