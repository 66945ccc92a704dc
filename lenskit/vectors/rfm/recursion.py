"""The recursion of a Recursive Feature Machine, carried out on n x n matrices.

From M = I, every later M lives in the span of the centred training rows X, and all that the
kernel needs of it is P = X M Xᵀ: dist²_ij = P_ii + P_jj - 2 P_ij. With K the Laplacian kernel,
a = (K + reg I)⁻¹ y, A_ji = a_i K_ij / dist_ij (0 where the distance is 0) and
W = (I - 11ᵀ/n)(A - diag(A1)), the centred gradients of the fitted function are W X M up to a
constant that the division by the largest entry of M removes. So for X = U S Qᵀ

    F = W P,    P' = FᵀF / c,    M' = Q TᵀT Qᵀ / c,    T = F U S⁻¹,    c = max_i ||T q_i||²

whatever d is: the matrices of the d x d procedure, not an approximation of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.vectors.rfm.spectral import (
    RowSpace,
    largest_entry,
    leading_pairs,
    orthonormal,
    relative_gap,
)

WIDTH = 8


@dataclass(frozen=True, order=True)
class Setting:
    """One candidate of the grid. The field order is the order in which ties are broken."""

    scaled: bool
    bandwidth: float
    iteration: int = 0


@dataclass(frozen=True)
class State:
    """All settings after one iteration. M = Q TᵀT Qᵀ / largest."""

    iteration: int
    factor: Float[Tensor, "block setting n r"]
    largest: Float[Tensor, "block setting"]
    top: Float[Tensor, "block setting r"]
    gap: Float[Tensor, "block setting"]


def iterate(
    space: RowSpace,
    y: Float[Tensor, "block n"],
    settings: Sequence[Setting],
    *,
    regularization: float = 1e-3,
    iterations: int = 10,
    dtype: torch.dtype = torch.float64,
) -> Iterator[State]:
    """Run the recursion for every block and setting at once; yield the state after each update.

    ``largest`` is zero from where a float32 kernel matrix has lost its positive definiteness.
    """
    norms = space.gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scaled = torch.tensor([s.scaled for s in settings], device=norms.device)[:, None]
    scale = torch.where(scaled, norms[:, None], 1.0)
    zero = scale <= 1e-12 * norms.amax(-1)[:, None, None]
    inverse = scale.masked_fill(zero, torch.inf).reciprocal()
    inner = space.gram[:, None] * inverse[..., None] * inverse[..., None, :]
    # Equal rows stay equal under every M; rounding must not turn 0 / 0 into a gradient.
    apart = _squared_distances(inner) > 1e-13 * _outer_sum(inner)
    rate = norms.new_tensor([-1 / s.bandwidth for s in settings])
    solve = partial(
        _gradient_weights,
        apart=apart.to(dtype),
        rate=rate[:, None, None],
        target=y.double()[:, None, :, None],
        regularization=regularization,
    )
    whiten = (scale[..., None] * space.whiten[:, None]).to(dtype)
    start = torch.randn(WIDTH, whiten.shape[-1], generator=torch.Generator().manual_seed(0))
    vectors = start.to(whiten).expand(whiten.shape[:2].numel(), *start.shape)
    # The first distances are the ones that rounding hurts most: P is float64 until the first M.
    metric = _Full(inner, whiten, space, vectors)
    for iteration in range(1, iterations + 1):
        state, metric = metric.updated(solve(metric.inner), iteration)
        yield state


@dataclass(frozen=True)
class _Full:
    """A metric known by P = X M Xᵀ."""

    inner: Float[Tensor, "block setting n n"]
    whiten: Float[Tensor, "block setting n r"]
    space: RowSpace
    vectors: Float[Tensor, "problem k r"]

    def updated(
        self, weights: Float[Tensor, "block setting n n"], iteration: int
    ) -> tuple[State, _Full | _Compact]:
        images = (weights @ self.inner).to(self.whiten.dtype)
        factor = images @ self.whiten
        shape = factor.shape[:2]
        pairs = leading_pairs(factor.flatten(0, 1), self.vectors)
        left = orthonormal(pairs.vectors.unflatten(0, shape) @ factor.mT)
        small = left @ factor
        rest = (factor - left.mT @ small).square().sum((-2, -1))
        largest = largest_entry(factor, self.space, small, rest)
        top, gap = (v.unflatten(0, shape) for v in (pairs.vectors[:, 0], pairs.gap))
        state = State(iteration, factor, largest, top, gap)
        shrink = _inverse_root(largest)
        if bool((rest <= torch.finfo(factor.dtype).eps * small.square().sum((-2, -1))).all()):
            small = small * shrink
            return state, _Compact(left @ images * shrink, small, self.space.outward(small))
        images *= shrink
        inner = images.mT @ images
        return state, replace(self, inner=inner, vectors=pairs.vectors[:, :WIDTH])


@dataclass(frozen=True)
class _Compact:
    """A metric M = Q SᵀS Qᵀ of so few dimensions k, to working precision, that S has k rows.

    ``images`` is S Qᵀ Xᵀ and ``columns`` is S Qᵀ. After some updates M has no more: every update
    multiplies it by itself. What remains to do is k x k, but for the kernel.
    """

    images: Float[Tensor, "block setting k n"]
    factor: Float[Tensor, "block setting k r"]
    columns: Float[Tensor, "block setting k d"]

    @property
    def inner(self) -> Float[Tensor, "block setting n n"]:
        return self.images.mT @ self.images

    def updated(
        self, weights: Float[Tensor, "block setting n n"], iteration: int
    ) -> tuple[State, _Compact]:
        gradients = self.images @ weights.mT
        values, rotation = torch.linalg.eigh(gradients @ gradients.mT)
        floor = torch.finfo(values.dtype).eps / 16 * values[..., -1:]
        values = torch.where(values > floor, values, 0.0)  # below is rounding, soon denormal
        root = values.sqrt().unsqueeze(-1) * rotation.mT
        images, factor, columns = (root @ part for part in (self.images, self.factor, self.columns))
        largest = columns.square().sum(-2).amax(-1)
        values, left = torch.linalg.eigh(factor @ factor.mT)
        top = (left[..., -1:].mT @ factor).squeeze(-2)
        top = top / top.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(top.dtype).tiny)
        gap = relative_gap(values[..., -1], values[..., -2:-1].sum(-1))
        shrink = _inverse_root(largest)
        state = State(iteration, factor, largest, top, gap)
        return state, _Compact(images * shrink, factor * shrink, columns * shrink)


def _inverse_root(largest: Float[Tensor, "block setting"]) -> Float[Tensor, "block setting 1 1"]:
    return largest.clamp_min(torch.finfo(largest.dtype).tiny).rsqrt()[..., None, None]


def _outer_sum(inner: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    return diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2)


def _squared_distances(inner: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    return _outer_sum(inner).sub_(inner, alpha=2)


def _gradient_weights(
    inner: Float[Tensor, "block setting n n"],
    *,
    apart: Float[Tensor, "block setting n n"],
    rate: Float[Tensor, "setting 1 1"],
    target: Float[Tensor, "block 1 n 1"],
    regularization: float,
) -> Float[Tensor, "block setting n n"]:
    """W: the gradient at row j of the kernel ridge solution is Σ_i W_ji M x_i, centred over j."""
    limits = torch.finfo(inner.dtype)
    noise = 4 * limits.eps * inner.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(limits.tiny)
    squared = _squared_distances(inner).clamp_min_(noise[..., None, None])
    apart = apart.to(inner.dtype)
    distance = squared.mul_(apart).sqrt_()
    # At a large bandwidth the kernel is 1 but for its last digits: solve in float64 always.
    kernel = distance.to(rate.dtype, copy=True).mul_(rate).exp_()
    # What equal rows are divided by does not matter: their difference is zero.
    weights = kernel.to(inner.dtype) / distance.add_(1 - apart)
    kernel.diagonal(dim1=-2, dim2=-1).add_(regularization)
    triangle, failed = torch.linalg.cholesky_ex(kernel)
    dual = torch.linalg.solve_triangular(triangle, target, upper=False)
    dual = torch.linalg.solve_triangular(triangle.mT, dual, upper=True)
    dual = dual.masked_fill((failed > 0)[..., None, None], 0).to(inner.dtype)
    sums = (dual.mT @ weights).squeeze(-2)
    weights *= dual.mT
    weights.diagonal(dim1=-2, dim2=-1).sub_(sums)
    return weights.sub_(weights.mean(-2, keepdim=True))
