"""Is a concept one direction of the prompts' differences, or several?"""

from __future__ import annotations

import numpy as np

from lenskit.vectors import Learner


class InDirections(Learner):
    """The covariance of the rows with the labels, as far as their main directions can say it.

    It is projected on the ``number`` first principal directions of the rows: with one it is the
    first of them, and with all it is the covariance itself.

    Parameters
    ----------
    number : int
        How many directions.
    """

    def __init__(self, number: int = 1):
        self.number = number

    def _direction(
        self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray
    ) -> np.ndarray:
        rows = X - X.mean(0)
        main = np.linalg.svd(rows, full_matrices=False)[2][: self.number]
        return main.T @ (main @ (rows.T @ (y - y.mean())))
