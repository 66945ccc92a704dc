"""The grid of a Recursive Feature Machine: which eigenvector of which M, for many blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import positive_numbers, whole
from lenskit.vectors.learner import split
from lenskit.vectors.rfm.recursion import Setting, State, iterate
from lenskit.vectors.rfm.spectral import RowSpace

TIE = 1e-9
SINGLE_PRECISION_ERROR = 2e-5
LARGEST_ANGLE = 1e-3


@dataclass(frozen=True)
class BlockFits:
    """One direction for each block, its score, and the candidate that gave it."""

    directions: Float[Tensor, "block d"]
    validation: Float[Tensor, " block"]
    settings: tuple[Setting, ...]


def fit_blocks(
    X: Float[Tensor, "block n d"],
    y: Float[Tensor, "*block n"],
    X_val: Float[Tensor, "block m d"] | None = None,
    y_val: Float[Tensor, "*block m"] | None = None,
    *,
    bandwidths: Sequence[float] = (1.0, 10.0, 100.0),
    scalings: Sequence[bool] = (False, True),
    regularization: float = 1e-3,
    iterations: int = 10,
    dtype: str = "float64",
    device: str | None = None,
    batch_size: int | None = None,
    scale_validation: bool = False,
) -> BlockFits:
    """Fit the whole grid for every block; keep the best eigenvector on validation.

    A candidate is the top eigenvector of M after 1 to ``iterations`` updates under one setting
    (M = I, before the first update, has none). Its score is the absolute Pearson correlation of
    the projected validation rows with ``y_val``. These rows are not scaled, even where the
    training rows are, since a vector is added to activations as they come; ``scale_validation``
    centres them by the training mean and, in the scaled variant, scales them to unit norm, as
    the authors' code does, which may choose another vector.

    Scores within 1e-9 are ties, and the first wins: in the order of ``scalings``, then of
    ``bandwidths``, then the earlier iteration. In float32, candidates too close to tell apart at
    that precision, and settings whose kernel matrix is not positive definite at it, are run again
    in float64.

    ``y`` is shared by the blocks, or one row for each. Without validation rows the last 20 %, at
    most 256, validate. ``batch_size`` blocks run together: by default one on a CPU, 32 on a GPU.
    The directions are unit norm, float64, on the device of the fit; their sign is arbitrary.

    Raises ``ValueError`` for a block with no direction (equal rows, equal labels).
    """
    fits = each_block(
        X,
        y,
        X_val,
        y_val,
        bandwidths=bandwidths,
        scalings=scalings,
        regularization=regularization,
        iterations=iterations,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        scale_validation=scale_validation,
    )
    directions, validation, settings = zip(*fits, strict=True)
    return BlockFits(torch.stack(directions), torch.stack(validation), settings)


def each_block(
    X: Float[Tensor, "block n d"],
    y: Float[Tensor, "*block n"],
    X_val: Float[Tensor, "block m d"] | None,
    y_val: Float[Tensor, "*block m"] | None,
    *,
    bandwidths: Sequence[float],
    scalings: Sequence[bool],
    regularization: float,
    iterations: int,
    dtype: str,
    device: str | None,
    batch_size: int | None = None,
    scale_validation: bool = False,
) -> Iterator[tuple[Float[Tensor, " d"], Float[Tensor, ""], Setting]]:
    """Direction, score and setting of one block after the other, as ``fit_blocks`` finds them."""
    if X.ndim != 3:
        raise ValueError(f"X must be [block, n, d], got shape {tuple(X.shape)}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    bandwidths = positive_numbers("bandwidths", bandwidths)
    if not 0 <= regularization < float("inf"):
        raise ValueError(f"regularization must be finite and not negative, got {regularization}")
    iterations = whole("iterations", iterations, 1)
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size, 1)
    if not (scalings := tuple(scalings)):
        raise ValueError("scalings is empty; give (False, True), or one of them")
    if X_val is None or y_val is None:
        train = split(X.shape[1])
        X, X_val, y, y_val = X[:, :train], X[:, train:], y[..., :train], y[..., train:]
    y, y_val = y.expand(X.shape[:2]), y_val.expand(X_val.shape[:2])
    on = X.device if device is None else torch.device(device)
    size = batch_size or (32 if on.type == "cuda" else 1)
    grid = [Setting(bool(s), float(b)) for s in scalings for b in bandwidths]
    run = partial(iterate, regularization=regularization, iterations=iterations)
    for begin in range(0, len(X), size):
        rows, labels, held_out, held_out_labels = (
            t[begin : begin + size].to(on, torch.float64) for t in (X, y, X_val, y_val)
        )
        _check_variation(begin, rows, labels, held_out_labels)
        data = _Data.of(rows, labels, held_out, held_out_labels, scale_validation)
        for block, (setting, top, score) in enumerate(_best(data, grid, run, dtype)):
            direction = data.space.rows[block].mT @ (data.space.whiten[block] @ top)
            yield direction / direction.norm(), score, setting


def _check_variation(begin: int, X: Tensor, y: Tensor, y_val: Tensor) -> None:
    for name, values in (("rows", X), ("labels", y), ("validation labels", y_val)):
        constant = (values == values[:, :1]).flatten(1).all(1).nonzero().flatten().tolist()
        if constant:
            where = ", ".join(str(begin + block) for block in constant)
            raise ValueError(f"the {name} of block {where} are all equal: no direction exists.")


@dataclass(frozen=True)
class _Data:
    """The span of the training rows and the validation rows, centred and projected on it.

    ``divisors``: what the validation rows are divided by in the scaled variant.
    """

    space: RowSpace
    y: Float[Tensor, "block n"]
    held_out: Float[Tensor, "block m r"]
    divisors: Float[Tensor, "block m"]
    y_val: Float[Tensor, "block m"]

    @classmethod
    def of(
        cls, X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor, scale_validation: bool
    ) -> _Data:
        space = RowSpace.of(X)
        X_val = X_val - X.mean(-2, keepdim=True)
        # Their whole norm, with what lies outside the span; a row of zeros stays one.
        norms = X_val.norm(dim=-1)
        divisors = torch.where(norms > 0, norms, 1.0) if scale_validation else norms.new_ones(())
        held_out = X_val @ space.rows.mT @ space.whiten
        return cls(space, y, held_out, divisors.expand_as(y_val), y_val)

    def __getitem__(self, blocks: slice) -> _Data:
        return _Data(*(getattr(self, field.name)[blocks] for field in fields(self)))


@dataclass(frozen=True)
class _Candidates:
    """Top eigenvectors in the span; score -1 where there is none; relative eigenvalue gaps."""

    tops: Float[Tensor, "block setting iteration r"]
    scores: Float[Tensor, "block setting iteration"]
    gaps: Float[Tensor, "block setting iteration"]


def _candidates(
    data: _Data,
    grid: Sequence[Setting],
    run: Callable[..., Iterator[State]],
    dtype: torch.dtype,
) -> _Candidates:
    kept = [(s.top, s.gap, s.largest) for s in run(data.space, data.y, grid, dtype=dtype)]
    tops, gaps, largest = (torch.stack(part, 2).double() for part in zip(*kept, strict=True))
    projected = torch.einsum("bsir,bmr->bsim", tops, data.held_out)
    for row, setting in enumerate(grid):
        if setting.scaled:
            projected[:, row] /= data.divisors[:, None]
    projected = projected - projected.mean(-1, keepdim=True)
    y_val = (data.y_val - data.y_val.mean(-1, keepdim=True))[:, None, None]
    norms = projected.norm(dim=-1) * y_val.norm(dim=-1)
    scores = (projected * y_val).sum(-1).abs() / norms
    valid = (largest > 0) & scores.isfinite()
    return _Candidates(tops, torch.where(valid, scores, -1.0), gaps)


def _best(
    data: _Data, grid: list[Setting], run: Callable[..., Iterator[State]], dtype: str
) -> Iterator[tuple[Setting, Tensor, Tensor]]:
    found = _candidates(data, grid, run, getattr(torch, dtype))
    for block in range(len(data.y)):
        tops, scores = found.tops[block], found.scores[block]
        if dtype == "float32":
            again, last = _unresolved(scores, found.gaps[block])
            if again:
                part = data[block : block + 1]
                settings = [grid[row] for row in again]
                cut = partial(run, iterations=last)
                exact = _candidates(part, settings, cut, torch.float64)
                scores[again] = -1.0
                tops[again, :last], scores[again, :last] = exact.tops[0], exact.scores[0]
        if not bool(scores.max() >= 0):
            raise ValueError("the validation rows do not vary along any direction found.")
        best = int((scores.flatten() >= scores.max() - TIE).nonzero()[0])
        row, column = divmod(best, scores.shape[1])
        yield replace(grid[row], iteration=column + 1), tops[row, column], scores[row, column]


def _unresolved(
    scores: Float[Tensor, "setting iteration"], gaps: Float[Tensor, "setting iteration"]
) -> tuple[list[int], int]:
    """Settings that float32 cannot rank, and the last iteration that matters.

    These are the failed ones, those whose scores might be the best, and the best if its vector
    might be off: rounding turns an eigenvector by an angle inversely proportional to its gap.
    """
    error = SINGLE_PRECISION_ERROR / gaps.clamp_min(1e-3)
    close = scores + error >= (scores - error).max()
    failed = (scores < 0).any(1)
    if bool(failed.any()):
        return (close.any(1) | failed).nonzero().flatten().tolist(), scores.shape[1]
    if int(close.sum()) == 1 and float(error[close]) < LARGEST_ANGLE:
        return [], 0
    return close.any(1).nonzero().flatten().tolist(), int(close.any(0).nonzero()[-1]) + 1
