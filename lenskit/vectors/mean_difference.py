"""Mean difference and its form for soft labels, the covariance with the labels (AGS section 3)."""

from __future__ import annotations

from lenskit.vectors.learner import Direction, Labels, Learner, Rows, positives


class MeanDifference(Learner):
    """Mean of the positive training rows minus mean of the negative ones.

    A row is positive where its label exceeds the lowest label.
    """

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        positive = positives(y)
        return X[positive].mean(0) - X[~positive].mean(0)


class SoftCovariance(Learner):
    """Covariance of the rows with the labels, Xᵀ(y - ȳ): for hard labels the mean difference."""

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        return (X - X.mean(0)).T @ (y - y.mean())
