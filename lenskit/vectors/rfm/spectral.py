"""Linear algebra of the span of a few rows: its basis, leading eigenpairs, largest entry.

Every function takes several problems at once along leading dimensions and runs on the device of
its tensors. Nothing here forms a d x d matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DEPTH = 4
RESTARTS = 5
TINY = 1e-300
ROUGH = 1e-4


@dataclass(frozen=True)
class RowSpace:
    """The span of centred rows X = U S Qᵀ (thin SVD), for several blocks at once.

    ``whiten`` is U S⁻¹, so that Q = Xᵀ whiten; its columns are zero where S vanishes, which
    centring makes so for at least one. All this is float64 whatever the precision of the caller:
    the Gram matrix squares the condition number of the rows. ``rough`` is Qᵀ in float32, and
    ``leverage`` its squared column norms, for bounds.
    """

    rows: Float[Tensor, "block n d"]
    gram: Float[Tensor, "block n n"]
    whiten: Float[Tensor, "block n r"]
    rough: Float[Tensor, "block r d"]
    leverage: Float[Tensor, "block d"]

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
        whiten = vectors * inverse.unsqueeze(-2)
        rough = whiten.mT.float() @ rows.float()
        return cls(rows, gram, whiten, rough, rough.square().sum(-2))

    def __getitem__(self, blocks: slice) -> RowSpace:
        return RowSpace(*(getattr(self, field.name)[blocks] for field in fields(self)))

    def outward(self, factor: Float[Tensor, "block setting k r"]) -> Float[Tensor, "b s k d"]:
        """``factor`` Qᵀ: vectors in the span become vectors of features."""
        rows = factor.flatten(1, 2) @ self.whiten.mT.to(factor.dtype) @ self.rows.to(factor.dtype)
        return rows.unflatten(1, factor.shape[1:3])


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
    found, accepted = _krylov(factor, orthonormal(start), tolerance)
    todo = (~accepted).nonzero().flatten()
    for _ in range(RESTARTS):
        if not len(todo):
            return found
        block = orthonormal(found.vectors[todo, : start.shape[1]])
        pairs, accepted = _krylov(factor[todo], block, tolerance)
        found, todo = _assigned(found, todo, pairs), todo[~accepted]
    return _assigned(found, todo, _dense(factor[todo], width)) if len(todo) else found


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
    space: RowSpace,
    small: Float[Tensor, "block setting k r"],
    rest: Float[Tensor, "block setting"],
) -> Float[Tensor, "block setting"]:
    """The largest entry of Q TᵀT Qᵀ, exactly: max_i ||T q_i||², q_i the rows of Q.

    The matrix is positive semidefinite, so its largest entry is on the diagonal. S = ``small`` is
    T projected on k of its left dimensions, so TᵀT = SᵀS + R with R positive semidefinite of
    trace ``rest``, and ||S q_i||² <= ||T q_i||² <= ||S q_i||² + ||R|| ||q_i||². Only coordinates
    whose upper bound exceeds the best value found are evaluated. ||R|| is bounded by its trace
    and, where that excludes too few, by ||R²||^(1/2) (Frobenius).

    The bounds are taken in float32 and widened by 1e-4, the values in the precision of T.
    """
    if factor.is_cuda:
        # The full product costs less there than waiting for the host to read the bounds.
        parts = (space.outward(t.unsqueeze(1)) for t in factor.unbind(1))
        return torch.cat([part.square().sum(-2).amax(-1) for part in parts], 1)
    scale = (rest + small.square().sum((-2, -1))).clamp_min(torch.finfo(rest.dtype).tiny)
    rest = (rest / scale).float() + ROUGH
    shrink = scale.rsqrt()[..., None, None]
    lower = ((small * shrink).float().flatten(1, 2) @ space.rough).square()
    lower = lower.unflatten(1, small.shape[1:3]).sum(-2)
    best = [
        _Diagonal(factor[block, row], shrink[block, row], space[block : block + 1]).largest(
            small[block, row], lower[block, row], rest[block, row]
        )
        for block in range(len(factor))
        for row in range(factor.shape[1])
    ]
    return torch.stack(best).view_as(rest)


@dataclass(frozen=True)
class _Diagonal:
    """The diagonal of Q TᵀT Qᵀ for one matrix T."""

    factor: Float[Tensor, "n r"]
    shrink: Float[Tensor, "1 1"]
    space: RowSpace

    def largest(
        self, small: Float[Tensor, "k r"], lower: Float[Tensor, " d"], bound: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        few = len(lower) // 8
        best, number = self.within(lower + bound * self.space.leverage[0], few)
        if number > few:
            t, s = (self.shrink * part for part in (self.factor, small))
            rest = (t.mT @ t - s.mT @ s).float()
            bound = torch.linalg.matrix_norm(rest @ rest).sqrt() + ROUGH
            best, number = self.within(lower + bound * self.space.leverage[0], few)
        if number > few:
            rough = ((self.shrink * self.factor).float() @ self.space.rough[0]).square().sum(0)
            best = self.at((rough >= (1 - ROUGH) * rough.max()).nonzero().flatten()).max()
        return best

    def within(self, upper: Float[Tensor, " d"], few: int) -> tuple[Float[Tensor, ""], int]:
        """The largest value, valid where the number of coordinates that may exceed it is few."""
        first = upper.topk(min(16, len(upper))).indices
        best = self.at(first).max()
        reach = (best * self.shrink.square().squeeze()).float() * (1 - ROUGH)
        candidates = (upper >= reach).nonzero().flatten()
        if len(candidates) <= len(first):
            return best, 0
        if len(candidates) <= few:
            best = self.at(candidates).max()
        return best, len(candidates)

    def at(self, coordinates: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The entries at these coordinates."""
        q = self.space.whiten[0].mT @ self.space.rows[0, :, coordinates]
        return (self.factor @ q.to(self.factor.dtype)).square().sum(0)
