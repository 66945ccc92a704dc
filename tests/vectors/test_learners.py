"""Each learner against an independent solution, and what all of them have in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Ridge as ReferenceRidge
from sklearn.utils.estimator_checks import parametrize_with_checks

from lenskit.vectors import (
    Learner,
    Logistic,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
    Ridge,
    SoftCovariance,
    split,
)
from lenskit.vectors.learner import oriented

LEARNERS = [
    MeanDifference(),
    SoftCovariance(),
    PrincipalComponent(),
    Ridge(),
    Logistic(),
    RecursiveFeatureMachine(),
]
FAST = [*LEARNERS[:-1], RecursiveFeatureMachine(bandwidths=(10.0,), iterations=2)]
each = pytest.mark.parametrize("learner", FAST, ids=lambda learner: type(learner).__name__)


def planted(
    seed: int = 0, n: int = 60, d: int = 30, hard: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels alternating from 1, and the direction they depend on."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    positive = np.arange(n) % 2 == 0
    y = positive.astype(float) if hard else positive * rng.uniform(0.2, 1, size=n)
    X = rng.normal(size=(n, d)) / np.sqrt(d) + 2 * y[:, None] * direction + rng.normal(size=d)
    return X, y, direction


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


@parametrize_with_checks(LEARNERS)
def test_the_learner_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


@each
@pytest.mark.parametrize("d", [10, 200])
def test_a_planted_direction_is_recovered(learner: Learner, d: int):
    X, y, direction = planted(n=200, d=d)
    learner.fit(X, y)
    assert learner.direction_ @ direction > 0.6
    assert learner.validation_ > 0.8


@each
def test_the_direction_has_unit_norm_and_the_sign_of_the_labels(learner: Learner):
    X, y, _ = planted(hard=False)
    learner.fit(X, y)
    assert np.linalg.norm(learner.direction_) == pytest.approx(1)
    projections = learner.transform(X)[:, 0]
    np.testing.assert_allclose(projections, X @ learner.direction_)
    assert np.corrcoef(projections, y)[0, 1] > 0
    expected = abs(np.corrcoef(projections[48:], y[48:])[0, 1])
    assert learner.validation_ == pytest.approx(expected)


@each
def test_without_validation_rows_the_last_fifth_validates(learner: Learner):
    X, y, _ = planted()
    alone = learner.fit(X, y).direction_
    np.testing.assert_array_equal(learner.fit(X[:48], y[:48], X[48:], y[48:]).direction_, alone)


def test_at_most_256_rows_validate_and_at_least_two():
    assert [split(n) for n in (4, 9, 10, 400, 1280, 5000)] == [2, 7, 8, 320, 1024, 4744]
    with pytest.raises(ValueError, match="n >= 4"):
        split(3)


@each
def test_sorted_labels_validate_on_all_rows_with_a_warning(learner: Learner):
    X, y, _ = planted()
    order = np.argsort(y, kind="stable")
    with pytest.warns(UserWarning, match="shuffle the rows"):
        learner.fit(X[order], y[order])
    assert np.corrcoef(X @ learner.direction_, y)[0, 1] > 0.5


@each
def test_constant_labels_are_refused(learner: Learner):
    X, y, _ = planted()
    with pytest.raises(ValueError, match="labels in y are all 2"):
        learner.fit(X, np.full(len(X), 2.0))
    with pytest.raises(ValueError, match="labels in y_val are all 1"):
        learner.fit(X[:48], y[:48], X[48:], np.ones(12))


@each
def test_validation_rows_that_do_not_fit_are_refused(learner: Learner):
    X, y, _ = planted()
    with pytest.raises(ValueError, match="give both or neither"):
        learner.fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="X_val has 29 features, but X has 30"):
        learner.fit(X, y, X[:, :-1], y)


@each
def test_float32_rows_give_a_float32_direction(learner: Learner):
    X, y, _ = planted()
    double = learner.fit(X, y).direction_
    single = learner.fit(X.astype(np.float32), y.astype(np.float32)).direction_
    assert (double.dtype, single.dtype) == (np.float64, np.float32)
    assert double @ single > 0.9999


@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(-20, 20))
def test_a_vector_added_to_all_rows_does_not_matter(learner: Learner, seed: int, size: float):
    X, y, _ = planted(seed, n=30, d=8, hard=False)
    shift = size * np.random.default_rng(seed).normal(size=8)
    expected = learner.fit(X, y).direction_
    assert learner.fit(X + shift, y).direction_ @ expected > 1 - 1e-6


@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_the_scale_of_the_labels_does_not_matter_and_their_sign_flips(learner, seed, scale):
    X, y, _ = planted(seed, n=30, d=8)
    expected = learner.fit(X, y).direction_
    assert learner.fit(X, scale * y).direction_ @ expected > 1 - 1e-6
    if not isinstance(learner, MeanDifference | PrincipalComponent | RecursiveFeatureMachine):
        assert learner.fit(X, -scale * y).direction_ @ expected < -1 + 1e-6


@pytest.mark.parametrize("learner", [MeanDifference(), SoftCovariance(), Ridge(), Logistic()])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_training_rows_does_not_matter(learner: Learner, seed: int):
    X, y, _ = planted(seed, n=30, d=40, hard=False)
    order = np.random.default_rng(seed).permutation(24)
    parts = X[24:], y[24:]
    expected = learner.fit(X[:24], y[:24], *parts).direction_
    assert learner.fit(X[:24][order], y[:24][order], *parts).direction_ @ expected > 1 - 1e-6


@pytest.mark.parametrize("learner", [MeanDifference(), SoftCovariance(), Ridge(), Logistic()])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_rotation_of_the_features_rotates_the_direction(learner: Learner, seed: int):
    X, y, _ = planted(seed, n=30, d=40, hard=False)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(40, 40)))[0]
    expected = learner.fit(X, y).direction_ @ rotation
    assert learner.fit(X @ rotation, y).direction_ @ expected > 1 - 1e-6


def test_mean_difference_is_the_mean_of_positives_minus_that_of_negatives():
    X, y, _ = planted()
    train = [(x, label) for x, label in zip(X[:48], y[:48], strict=True)]
    positive = sum(x for x, label in train if label) / 24
    negative = sum(x for x, label in train if not label) / 24
    np.testing.assert_allclose(MeanDifference().fit(X, y).direction_, unit(positive - negative))


def test_mean_difference_takes_every_label_above_the_lowest_as_positive():
    X, y, _ = planted(hard=False)
    hard = MeanDifference().fit(X, (y > 0).astype(float)).direction_
    np.testing.assert_allclose(MeanDifference().fit(X, y).direction_, hard)


def test_the_covariance_of_hard_labels_is_the_mean_difference():
    X, y, _ = planted()
    expected = MeanDifference().fit(X, y).direction_
    np.testing.assert_allclose(SoftCovariance().fit(X, y).direction_, expected, atol=1e-12)


def test_the_covariance_is_the_covariance_of_each_feature_with_the_labels():
    X, y, _ = planted(hard=False)
    expected = unit(np.array([np.cov(column, y[:48])[0, 1] for column in X[:48].T]))
    np.testing.assert_allclose(SoftCovariance().fit(X, y).direction_, expected)


@pytest.mark.parametrize("d", [8, 100])
def test_pca_is_the_first_component_of_the_signed_differences(d: int):
    X, y, _ = planted(d=d)
    signs = np.random.default_rng(7).choice([-1.0, 1.0], 24)
    differences = signs[:, None] * (X[:48:2] - X[1:48:2])
    expected = np.linalg.svd(differences - differences.mean(0))[2][0]
    found = PrincipalComponent(random_state=7).fit(X, y).direction_
    assert abs(found @ expected) == pytest.approx(1)


def test_pca_pairs_the_kth_positive_with_the_kth_negative_wherever_they_are():
    X, y, _ = planted()
    order = np.r_[np.arange(0, 48, 2), np.arange(1, 48, 2), np.arange(48, 60)]
    expected = PrincipalComponent().fit(X, y).direction_
    np.testing.assert_allclose(PrincipalComponent().fit(X[order], y[order]).direction_, expected)


def test_pca_of_rows_that_do_not_differ_is_refused():
    with pytest.raises(ValueError, match="differ"):
        PrincipalComponent().fit(np.ones((20, 3)), np.arange(20) % 2)


@pytest.mark.parametrize("d", [12, 120])
def test_ridge_is_the_solution_of_the_best_alpha(d: int):
    X, y, _ = planted(d=d, hard=False)
    solutions = [ReferenceRidge(alpha=a).fit(X[:48], y[:48]).coef_ for a in Ridge().alphas]
    scores = [abs(np.corrcoef(X[48:] @ w, y[48:])[0, 1]) for w in solutions]
    best = int(np.argmax(scores))
    ridge = Ridge().fit(X, y)
    assert ridge.alpha_ == Ridge().alphas[best]
    np.testing.assert_allclose(ridge.direction_, unit(solutions[best]), atol=1e-9)
    single = Ridge(alphas=(10.0,)).fit(X, y)
    np.testing.assert_allclose(single.direction_, unit(solutions[-1]), atol=1e-9)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("d", [10, 80])
def test_logistic_minimises_the_penalised_loss_of_hard_and_soft_labels(d: int, hard: bool):
    X, y, _ = planted(d=d, hard=hard)
    y = y / y[:48].max()
    mean = X[:48].mean(0)

    def loss(w: np.ndarray, C: float, rows: slice, penalty: float = 0.5) -> float:
        margin = (X[rows] - mean) @ w
        fit = np.logaddexp(0, -margin) @ y[rows] + np.logaddexp(0, margin) @ (1 - y[rows])
        return C * fit + penalty * w @ w

    solutions = {}
    for C in (1.0, 0.1):
        solutions[C] = minimize(loss, np.zeros(d), (C, slice(48)), tol=1e-9).x
    best = min(solutions, key=lambda C: loss(solutions[C], 1, slice(48, None), penalty=0))
    found = Logistic(Cs=(1.0, 0.1)).fit(X, y)
    assert found.C_ == best
    assert found.direction_ @ unit(solutions[best]) > 1 - 1e-5


def test_a_direction_without_correlation_has_its_largest_component_positive():
    X = np.array([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    y = np.array([1.0, 1, 0, 0])
    np.testing.assert_allclose(oriented(np.array([0.6, -0.8]), X, y), [-0.6, 0.8])
    with pytest.raises(ValueError, match="no direction"):
        oriented(np.zeros(2), X, y)
