"""Principal component of paired differences (AGS section 3; arXiv 2310.01405)."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

from lenskit.vectors.learner import Direction, Labels, Learner, Rows, positives


class PrincipalComponent(Learner):
    """First principal component of the differences between paired rows.

    The k-th positive training row is paired with the k-th negative one (what is left over is not
    used), and every difference gets a random sign: centring them would otherwise remove the mean
    difference, which is what is looked for.

    Parameters
    ----------
    random_state : int or None
        Seed of the signs. None is 0 here, and the seed of ``fit_vectors`` there.
    """

    def __init__(self, random_state: int | None = None):
        self.random_state = random_state

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        positive = positives(y)
        first, second = X[positive].astype(np.float64), X[~positive].astype(np.float64)
        pairs = min(len(first), len(second))
        signs = np.random.default_rng(self.random_state or 0).choice([-1.0, 1.0], pairs)
        differences = signs[:, None] * (first[:pairs] - second[:pairs])
        if pairs > 1:
            differences -= differences.mean(0)
        if not differences.any():
            raise ValueError("the paired rows differ by the same vector or not at all.")
        wide = differences.shape[1] > pairs
        square = differences @ differences.T if wide else differences.T @ differences
        top = eigh(square, subset_by_index=[len(square) - 1] * 2)[1][:, 0]
        return differences.T @ top if wide else top
