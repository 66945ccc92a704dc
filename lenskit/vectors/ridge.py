"""Ridge regression on the labels (AGS section 3, «linear»)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lenskit._arguments import positive_numbers
from lenskit.vectors.learner import Direction, Labels, Learner, Rows, pearson


class Ridge(Learner):
    """Coefficients of ridge regression, rows and labels centred; the best alpha on validation.

    One eigendecomposition serves all alphas: of X Xᵀ where there are fewer rows than features,
    else of XᵀX.

    Parameters
    ----------
    alphas : sequence of float
        Penalties to try. The one whose validation projections correlate most with the labels is
        kept, the first of equals; ``alpha_`` after fitting.
    """

    def __init__(self, alphas: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)):
        self.alphas = alphas

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        alphas = positive_numbers("alphas", self.alphas)
        X = X.astype(np.float64) - X.mean(0, dtype=np.float64)
        y = y - y.mean()
        if len(X) < X.shape[1]:
            values, vectors = np.linalg.eigh(X @ X.T)
            basis, target = X.T @ vectors, vectors.T @ y
        else:
            values, basis = np.linalg.eigh(X.T @ X)
            target = basis.T @ (X.T @ y)
        shrunk = target[:, None] / (values.clip(0)[:, None] + np.asarray(alphas))
        projections = X_val @ basis @ shrunk
        scores = [abs(pearson(column, y_val)) for column in projections.T]
        best = int(np.nan_to_num(scores, nan=-1.0).argmax())
        self.alpha_ = alphas[best]
        return basis @ shrunk[:, best]
