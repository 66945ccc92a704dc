"""Recursive Feature Machine: kernel ridge regression that learns its metric (AGS section 3).

arXiv 2212.13881 introduced it. ``recursion`` runs it in the span of the training rows, ``grid``
chooses among its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lenskit.vectors.learner import TYPES, Direction, Labels, Learner, Rows
from lenskit.vectors.rfm.grid import fit_blocks
from lenskit.vectors.rfm.recursion import iterate
from lenskit.vectors.rfm.spectral import RowSpace


class RecursiveFeatureMachine(Learner):
    """Top eigenvector of the average gradient outer product of a kernel machine.

    The grid is every bandwidth with the training rows as centred, and scaled to unit norm; the
    rules of choice are those of ``fit_blocks``. ``setting_`` is the candidate chosen: ``scaled``,
    ``bandwidth`` and ``iteration`` (how many updates M has had). ``predict`` is the kernel
    machine with the M chosen.

    Parameters
    ----------
    bandwidths : sequence of float
        Bandwidths of the Laplacian kernel.
    scalings : sequence of bool
        Whether the centred rows are scaled to unit norm.
    regularization : float
        Added to the diagonal of the kernel matrix.
    iterations : int
        Updates of M.
    dtype : "float64" or "float32"
        Precision of the recursion. In float32, near ties are decided in float64.
    device : str or None
        Where to compute; None is the CPU here, and the device of the rows in ``fit_blocks``.
    scale_validation : bool
        Whether the scaled variant scales the validation rows too, as the authors' code does. It
        decides which vector is chosen, not what the candidates are.
    """

    def __init__(
        self,
        bandwidths: Sequence[float] = (1.0, 10.0, 100.0),
        scalings: Sequence[bool] = (False, True),
        regularization: float = 1e-3,
        iterations: int = 10,
        dtype: str = "float64",
        device: str | None = None,
        scale_validation: bool = False,
    ):
        self.bandwidths = bandwidths
        self.scalings = scalings
        self.regularization = regularization
        self.iterations = iterations
        self.dtype = dtype
        self.device = device
        self.scale_validation = scale_validation

    def _direction(self, X: Rows, y: Labels, X_val: Rows, y_val: Labels) -> Direction:
        tensors = [torch.from_numpy(np.array(a)) for a in (X, y, X_val, y_val)]
        rows, labels, held_out, held_out_labels = tensors
        fit = fit_blocks(
            rows[None], labels, held_out[None], held_out_labels, **self.get_params(deep=False)
        )
        self.setting_ = fit.settings[0]
        self.X_fit_, self.y_fit_ = X, y
        return fit.directions[0].cpu().numpy()

    def _metric(self) -> Float[Tensor, "n d"]:
        """L with M = LᵀL, from running the chosen setting again."""
        check_is_fitted(self)
        rows, labels = torch.from_numpy(np.array(self.X_fit_)), torch.from_numpy(self.y_fit_)
        space = RowSpace.of(rows[None])
        states = iterate(
            space,
            labels[None],
            [self.setting_],
            regularization=self.regularization,
            iterations=self.setting_.iteration,
        )
        state = list(states)[-1]
        return space.outward(state.factor)[0, 0] / state.largest[0, 0].sqrt()

    def matrix_(self) -> Float[np.ndarray, "d d"]:
        """The learnt metric M of the setting chosen, float64, largest entry 1; computed anew."""
        metric = self._metric()
        return (metric.mT @ metric).numpy()

    def predict(self, X: ArrayLike) -> Labels:
        """The kernel ridge solution under the learnt metric, shape (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=TYPES, reset=False)
        mean, metric = self.X_fit_.mean(0, dtype=np.float64), self._metric()

        def mapped(rows: Rows) -> Tensor:
            centred = torch.from_numpy(rows - mean)
            if self.setting_.scaled:
                centred = torch.nn.functional.normalize(centred, dim=-1)
            return centred @ metric.mT

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-torch.cdist(a, b) / self.setting_.bandwidth)

        landmarks = mapped(self.X_fit_)
        ridge = self.regularization * torch.eye(len(landmarks), dtype=torch.float64)
        dual = torch.linalg.solve(
            kernel(landmarks, landmarks) + ridge, torch.from_numpy(self.y_fit_)
        )
        return (kernel(mapped(X), landmarks) @ dual).numpy()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = False
        return tags
