"""The covariance in few directions, against its projection by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lenskit.study.experiments.directions import InDirections
from lenskit.vectors import SoftCovariance


@pytest.fixture
def rows():
    made = np.random.default_rng(0).normal(size=(40, 6)) * [9, 5, 3, 2, 1, 0.5]
    return made, made @ [0.1, 0.2, 0.5, 0, 0, 1]


def test_one_direction_is_the_first_principal_one(rows):
    X, y = rows
    train = X[:32] - X[:32].mean(0)
    first = np.linalg.eigh(train.T @ train)[1][:, -1]
    assert abs(InDirections(1).fit(X, y).direction_ @ first) == pytest.approx(1)


def test_all_directions_are_the_covariance_and_more_are_nearer_to_it(rows):
    X, y = rows
    whole = SoftCovariance().fit(X, y).direction_
    cosines = [InDirections(k).fit(X, y).direction_ @ whole for k in (1, 2, 4, 6)]
    assert cosines == sorted(cosines) and cosines[-1] == pytest.approx(1)
