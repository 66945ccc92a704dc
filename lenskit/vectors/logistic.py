"""Logistic regression on hard or soft labels (AGS section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from lenskit._arguments import positive_numbers
from lenskit.vectors.learner import Direction, Labels, Learner, Rows


class Logistic(Learner):
    """Coefficients of logistic regression without intercept; the best C on validation log-loss.

    Rows are centred by the training mean, which does the work of the intercept. Labels are
    min-max scaled to [0, 1] by the training labels; every row counts twice, as positive with
    weight y and as negative with weight 1 - y, which for hard labels is the ordinary loss. The
    penalty leaves the solution in the span of the rows, so it is found there.

    Parameters
    ----------
    Cs : sequence of float
        Inverse penalties to try, the first of equals is kept; ``C_`` after fitting.
    """

    def __init__(self, Cs: Sequence[float] = (1000.0, 10.0, 1.0, 0.1)):
        self.Cs = Cs

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        mean = X.mean(0, dtype=np.float64)
        X, X_val = X - mean, X_val - mean
        low, high = y.min(), y.max()
        y, y_val = ((v - low) / (high - low) for v in (y, y_val))
        basis = _row_basis(X)
        rows, weights = np.concatenate([X @ basis] * 2), np.concatenate([y, 1 - y])
        classes, counted = np.repeat([1, 0], len(y)), weights > 0
        best = np.inf
        for C in positive_numbers("Cs", self.Cs):
            # A few Newton steps; the default solver stops far from the optimum at a large C.
            model = LogisticRegression(
                C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-6, max_iter=1000
            )
            model.fit(rows[counted], classes[counted], sample_weight=weights[counted])
            loss = _log_loss(X_val @ (basis @ model.coef_[0]), y_val)
            if loss < best:
                best, self.C_, coefficients = loss, C, model.coef_[0]
        return basis @ coefficients


def _row_basis(X: Rows) -> np.ndarray:
    if len(X) >= X.shape[1]:
        return np.eye(X.shape[1])
    return np.linalg.qr(X.T)[0]


def _log_loss(margin: Labels, y: Labels) -> float:
    return float(np.mean(np.logaddexp(0, margin) - y * margin))
