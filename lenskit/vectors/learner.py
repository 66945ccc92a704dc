"""What all learners share: the validation split, the sign of a direction, the estimator."""

from __future__ import annotations

import warnings
from typing import Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data

Rows = Float[np.ndarray, "n d"]
Labels = Float[np.ndarray, " n"]
Direction = Float[np.ndarray, " d"]
TYPES = [np.float64, np.float32]


def split(rows: int, validation: float = 0.2, max_validation: int = 256) -> int:
    """How many leading rows train: the last fifth, 2 to 256 rows, validate."""
    if rows < 4:
        raise ValueError(f"rows to train and to validate need n >= 4, but n = {rows}.")
    return rows - min(max_validation, max(2, int(validation * rows)))


def pearson(a: Labels, b: Labels) -> float:
    """Pearson correlation; nan where either side is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else float("nan")


def oriented(direction: Direction, X: Rows, y: Labels) -> Direction:
    """The unit vector along ``direction`` on whose side the projection grows with y.

    Without any correlation its largest component is made positive. Raises ValueError for a
    direction that is zero or not finite.
    """
    direction = np.asarray(direction, dtype=np.float64)
    norm = np.linalg.norm(direction)
    if not (np.isfinite(norm) and norm > 0):
        raise ValueError("the learner found no direction: do the rows depend on the labels?")
    correlation = pearson(X @ direction, y)
    if not np.isfinite(correlation) or correlation == 0:
        correlation = direction[np.abs(direction).argmax()]
    return direction * (np.sign(correlation) / norm)


def positives(y: Labels) -> np.ndarray:
    """Which rows count as positive where a learner needs two groups: those above the lowest label.

    Soft labels are 0 exactly for prompts without a prefix, so this recovers the hard labels.
    """
    return y > y.min()


class Learner(TransformerMixin, RegressorMixin, BaseEstimator):
    """A direction in feature space that predicts y: ``direction_``, unit norm.

    Subclasses implement ``_direction``. The projection on the direction correlates positively
    with y over all rows given; ``validation_`` is its absolute Pearson correlation on the
    validation rows. ``transform`` returns projections, shape (n, 1); ``predict`` the
    least-squares line of the training labels on them.
    """

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        raise NotImplementedError

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        X_val: ArrayLike | None = None,
        y_val: ArrayLike | None = None,
    ) -> Self:
        """Learn from rows X (n, d) and labels y (n,).

        Without validation rows, the last 20 % of the rows (at most 256) validate; where that
        leaves either part with equal labels, all rows do both, with a warning. Raises
        ``ValueError`` where labels given are all equal.
        """
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val belong together: give both or neither")
        fewest = 4 if X_val is None else 2
        X, y = validate_data(self, X, y, dtype=TYPES, y_numeric=True, ensure_min_samples=fewest)
        _check_labels(y := y.astype(np.float64), "y")
        if X_val is None:
            X, y, X_val, y_val = _split(X, y)
        else:
            X_val, y_val = check_X_y(
                X_val, y_val, dtype=TYPES, y_numeric=True, ensure_min_samples=2
            )
            if X_val.shape[1] != X.shape[1]:
                raise ValueError(f"X_val has {X_val.shape[1]} features, but X has {X.shape[1]}")
            _check_labels(y_val := y_val.astype(np.float64), "y_val")
        everything = np.concatenate([X, X_val]), np.concatenate([y, y_val])
        direction = oriented(self._direction(X, y, X_val, y_val), *everything)
        self.direction_ = direction.astype(X.dtype)
        self.validation_ = abs(pearson(X_val @ direction, y_val))
        projection = X @ direction
        centred = projection - projection.mean()
        self.slope_ = float(centred @ y / max(centred @ centred, np.finfo(np.float64).tiny))
        self.intercept_ = float(y.mean() - self.slope_ * projection.mean())
        return self

    def transform(self, X: ArrayLike) -> Float[np.ndarray, "n 1"]:
        """Projections of the rows on the direction, shape (n, 1)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=TYPES, reset=False)
        return (X @ self.direction_)[:, None]

    def predict(self, X: ArrayLike) -> Labels:
        """The least-squares line of the training labels on the projections, shape (n,)."""
        return self.transform(X)[:, 0] * self.slope_ + self.intercept_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # one direction, not always a least-squares one
        return tags


def _check_labels(y: Labels, name: str) -> None:
    if np.ptp(y) == 0:
        raise ValueError(
            f"the {len(y)} labels in {name} are all {y[0]:g}, so there is no direction to find or "
            "to judge; give rows with low and rows with high labels"
        )


def _split(X: Rows, y: Labels) -> tuple[Rows, Labels, Rows, Labels]:
    train = split(len(X))
    if np.ptp(y[:train]) > 0 and np.ptp(y[train:]) > 0:
        return X[:train], y[:train], X[train:], y[train:]
    warnings.warn(
        "the first 80 % or the last 20 % of the rows have equal labels, so all rows both train "
        "and validate; shuffle the rows, or pass X_val and y_val",
        stacklevel=3,
    )
    return X, y, X, y
