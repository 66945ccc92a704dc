"""The recursion in the span against a textbook procedure on d x d matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lenskit.vectors import RecursiveFeatureMachine, fit_blocks
from lenskit.vectors.rfm.recursion import Setting, iterate
from lenskit.vectors.rfm.spectral import RowSpace, largest_entry, leading_pairs, orthonormal

BANDWIDTHS = (1.0, 10.0, 100.0)
GRID = [Setting(scaled, bandwidth) for scaled in (False, True) for bandwidth in BANDWIDTHS]
DATA = ["wide", "tall", "square", "duplicates", "outlying dimension", "hard", "tall and hard"]


def textbook(
    X: Tensor, y: Tensor, scaled: bool, bandwidth: float, updates: int
) -> Iterator[Tensor]:
    """M after each update, row by row, with nothing factored."""
    n, d = X.shape
    X = X - X.mean(0)
    if scaled:
        X = torch.stack([x / x.norm() if x.norm() > 0 else x for x in X])
    M = torch.eye(d, dtype=torch.float64)
    for _ in range(updates):
        distance = torch.zeros(n, n, dtype=torch.float64)
        for j in range(n):
            difference = X[j] - X
            distance[j] = ((difference @ M) * difference).sum(1).clamp_min(0).sqrt()
        kernel = torch.exp(-distance / bandwidth)
        alpha = torch.linalg.solve(kernel + 1e-3 * torch.eye(n, dtype=torch.float64), y)
        gradients = torch.zeros(n, d, dtype=torch.float64)
        for j in range(n):
            others = distance[j] > 0
            factor = alpha[others] * kernel[j, others] / (bandwidth * distance[j, others])
            gradients[j] = -(factor[:, None] * ((X[j] - X[others]) @ M)).sum(0)
        gradients = gradients - gradients.mean(0)
        M = gradients.T @ gradients / n
        M = M / M.max()
        yield M


def top(M: Tensor) -> Tensor:
    return torch.linalg.eigh(M).eigenvectors[:, -1]


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def cosine(a: Tensor, b: Tensor) -> float:
    return abs(float(a.double() @ b.double() / (a.norm() * b.norm())))


@cache
def data(kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with one planted direction; the last quarter validates."""
    generator = torch.Generator().manual_seed(seed)
    n, d = {"tall": (60, 20), "tall and hard": (60, 20), "square": (41, 30)}.get(kind, (44, 90))
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) * spread
    direction = torch.nn.functional.normalize(
        torch.randn(d, generator=generator, dtype=torch.float64), dim=0
    )
    active = (torch.arange(n) % 2) * torch.rand(n, generator=generator, dtype=torch.float64)
    X = X + 3 * active[:, None] * direction + 1
    if kind == "outlying dimension":
        X[:, 7] += 40
        X[:, 3] *= 8
    if kind == "duplicates":
        X[5], X[8:11], active[5] = X[2], X[1], active[2]
    y = (active > 0).double() if "hard" in kind else active / active.max()
    X = X / X.norm(dim=1, keepdim=True)
    train = 3 * n // 4
    return X[:train], y[:train], X[train:], y[train:]


@cache
def reference(kind: str) -> dict[Setting, Tensor]:
    X, y, _, _ = data(kind)
    return {
        Setting(one.scaled, one.bandwidth, iteration): M
        for one in GRID
        for iteration, M in enumerate(textbook(X, y, one.scaled, one.bandwidth, 10), 1)
    }


@pytest.mark.parametrize("kind", DATA)
def test_m_equals_the_textbook_matrix_at_every_iteration(kind):
    X, y, _, _ = data(kind)
    space = RowSpace.of(X[None])
    basis = (space.rows.mT @ space.whiten)[0]
    for state in iterate(space, y[None], GRID):
        for row, one in enumerate(GRID):
            expected = reference(kind)[Setting(one.scaled, one.bandwidth, state.iteration)]
            gradients = state.factor[0, row] @ basis.T
            found = gradients.T @ gradients / state.largest[0, row]
            assert float((found - expected).norm() / expected.norm()) < 1e-6
            assert cosine(basis @ state.top[0, row], top(expected)) > 0.9999


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", DATA)
def test_the_setting_and_the_vector_are_those_of_the_textbook(kind, dtype):
    X, y, X_val, y_val = data(kind)
    scores = {s: abs(correlation(X_val @ top(M), y_val)) for s, M in reference(kind).items()}
    best = max(scores, key=scores.__getitem__)
    fit = fit_blocks(X[None], y, X_val[None], y_val, dtype=dtype)
    assert fit.settings == (best,)
    assert cosine(fit.directions[0], top(reference(kind)[best])) > 0.9999
    assert float(fit.directions[0].norm()) == pytest.approx(1)
    assert float(fit.validation[0]) == pytest.approx(scores[best], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", DATA)
def test_validation_rows_are_scaled_like_the_training_rows_where_that_is_asked_for(kind, dtype):
    X, y, X_val, y_val = data(kind)
    X_val = X_val * torch.linspace(0.1, 5, len(X_val), dtype=torch.float64)[:, None]
    centred = X_val - X.mean(0)
    rows = {False: centred, True: centred / centred.norm(dim=1, keepdim=True)}
    scores = {
        s: abs(correlation(rows[s.scaled] @ top(M), y_val)) for s, M in reference(kind).items()
    }
    best = max(scores, key=scores.__getitem__)
    parts = X[None], y, X_val[None], y_val
    fit = fit_blocks(*parts, dtype=dtype, scale_validation=True)
    assert fit.settings == (best,)
    assert cosine(fit.directions[0], top(reference(kind)[best])) > 0.9999
    assert float(fit.validation[0]) == pytest.approx(scores[best], abs=1e-4)
    machine = RecursiveFeatureMachine(dtype=dtype, scale_validation=True)
    assert machine.fit(*(part.numpy() for part in (X, y, X_val, y_val))).setting_ == best


def test_whether_validation_rows_are_scaled_can_change_the_vector():
    X, y, X_val, y_val = data("wide")
    X_val = X_val * torch.linspace(0.1, 5, len(X_val), dtype=torch.float64)[:, None]
    unscaled, scaled = (
        fit_blocks(X[None], y, X_val[None], y_val, scale_validation=each) for each in (False, True)
    )
    assert unscaled.settings != scaled.settings


def test_a_validation_row_equal_to_the_training_mean_stays_zero_when_scaled():
    X, y, X_val, y_val = data("wide")
    X_val = X_val.clone()
    X_val[2] = X.mean(0)
    fit = fit_blocks(X[None], y, X_val[None], y_val, scale_validation=True)
    assert bool(fit.validation.isfinite().all()) and bool(fit.directions.isfinite().all())


@pytest.mark.parametrize("n, d, strength", [(120, 300, 1.0), (100, 40, 0.3), (90, 200, 0.0)])
def test_float32_chooses_what_float64_chooses(n, d, strength):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(2, n, d, generator=generator)
        y = torch.rand(n, generator=generator)
        X = torch.nn.functional.normalize(X, dim=-1) + strength * y[:, None] / d**0.5
        double, single = fit_blocks(X, y), fit_blocks(X, y, dtype="float32")
        assert single.settings == double.settings
        for a, b in zip(single.directions, double.directions, strict=True):
            assert cosine(a, b) > 0.9999


def test_blocks_fitted_together_equal_blocks_fitted_one_by_one():
    parts = [data(kind) for kind in ("wide", "hard", "outlying dimension", "duplicates")]
    X, y, X_val, y_val = (torch.stack(part) for part in zip(*parts, strict=True))
    together = fit_blocks(X, y, X_val, y_val, batch_size=3)
    for block, part in enumerate(parts):
        alone = fit_blocks(part[0][None], part[1], part[2][None], part[3])
        assert alone.settings[0] == together.settings[block]
        assert cosine(alone.directions[0], together.directions[block]) > 1 - 1e-9


def test_one_label_vector_is_shared_by_all_blocks():
    X, y, X_val, y_val = data("wide")
    shared = fit_blocks(X.expand(2, -1, -1), y, X_val.expand(2, -1, -1), y_val)
    assert shared.settings[0] == shared.settings[1]
    assert torch.equal(shared.directions[0], shared.directions[1])


def test_without_validation_rows_the_last_fifth_validates():
    X, y, X_val, y_val = data("tall")
    X, y = torch.cat([X, X_val]), torch.cat([y, y_val])
    split = 4 * len(X) // 5
    given_rows = fit_blocks(X[None, :split], y[:split], X[None, split:], y[split:])
    found = fit_blocks(X[None], y)
    assert found.settings == given_rows.settings
    assert torch.equal(found.directions, given_rows.directions)


def test_the_identity_is_never_a_candidate():
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(6, 40, 64, generator=generator)
    y = torch.randint(2, (40,), generator=generator).float()
    assert all(chosen.iteration >= 1 for chosen in fit_blocks(X, y).settings)
    assert fit_blocks(X, y, iterations=1).settings[0].iteration == 1


def test_ties_go_to_the_first_in_the_documented_order():
    X, y, X_val, y_val = data("wide")
    rows = X[None], y, X_val[None], y_val
    twice = fit_blocks(*rows, bandwidths=(10.0, 10.0 * (1 + 1e-15)), scalings=(False,))
    assert twice.settings[0].bandwidth == 10.0
    # In one dimension every candidate is the same vector.
    line = [t[..., :1] for t in (rows[0], rows[2])]
    assert fit_blocks(line[0], y, line[1], y_val).settings == (Setting(False, 1.0, 1),)


def test_the_order_of_the_grid_is_that_of_the_arguments():
    X, y, X_val, y_val = (t[..., :1] if t.ndim == 2 else t for t in data("wide"))
    fit = fit_blocks(
        X[None], y, X_val[None], y_val, bandwidths=(100.0, 1.0), scalings=(True, False)
    )
    assert fit.settings == (Setting(True, 100.0, 1),)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rows_that_are_all_duplicated_give_a_finite_unit_vector(dtype):
    X, y, X_val, y_val = data("wide")
    doubled = fit_blocks(X.repeat(3, 1)[None], y.repeat(3), X_val[None], y_val, dtype=dtype)
    assert bool(doubled.directions.isfinite().all())
    assert float(doubled.validation[0]) > 0.5


def test_a_row_equal_to_the_mean_has_no_direction_and_does_no_harm():
    X, y, X_val, y_val = data("wide")
    X = torch.cat([X, X.mean(0, keepdim=True), X.mean(0, keepdim=True)])
    y = torch.cat([y, y.mean()[None], y.mean()[None]])
    fit = fit_blocks(X[None], y, X_val[None], y_val, scalings=(True,))
    assert bool(fit.directions.isfinite().all())


def test_rows_of_zeros_are_rows_like_others():
    X, y, X_val, y_val = data("tall")
    X = X.clone()
    X[4] = 0
    machine = RecursiveFeatureMachine(bandwidths=(10.0,), scalings=(False,), iterations=3)
    machine.fit(X.numpy(), y.numpy(), X_val.numpy(), y_val.numpy())
    *_, expected = textbook(X, y, False, 10.0, machine.setting_.iteration)
    np.testing.assert_allclose(machine.matrix_(), expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("part, name", [(0, "rows"), (1, "labels"), (3, "validation labels")])
def test_constant_data_are_refused_naming_the_block(part, name):
    parts = [torch.stack([t, t]) for t in data("wide")]
    parts[part][1] = parts[part][1, :1]
    with pytest.raises(ValueError, match=f"the {name} of block 1 are all equal"):
        fit_blocks(*parts)


def test_wrong_arguments_are_refused():
    X, y, _, _ = data("wide")
    with pytest.raises(ValueError, match=r"X must be \[block, n, d\]"):
        fit_blocks(X, y)
    with pytest.raises(ValueError, match="dtype must be"):
        fit_blocks(X[None], y, dtype="float16")
    with pytest.raises(ValueError, match="n >= 4"):
        fit_blocks(X[None, :3], y[:3])
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        fit_blocks(X[None], y, batch_size=-1)


def test_the_estimator_gives_the_metric_and_the_kernel_machine_of_its_setting():
    X, y, X_val, y_val = data("duplicates")
    for scaled in (False, True):
        machine = RecursiveFeatureMachine(bandwidths=(10.0,), scalings=(scaled,))
        machine.fit(X.numpy(), y.numpy(), X_val.numpy(), y_val.numpy())
        *_, M = textbook(X, y, scaled, 10.0, machine.setting_.iteration)
        np.testing.assert_allclose(machine.matrix_(), M.numpy(), atol=1e-8)

        rows, new = X - X.mean(0), X_val - X.mean(0)
        if scaled:
            rows, new = (t / t.norm(dim=1, keepdim=True) for t in (rows, new))
        pairs = [[(a - b) @ M @ (a - b) for b in rows] for a in torch.cat([rows, new])]
        kernel = torch.exp(-torch.tensor(pairs).clamp_min(0).sqrt() / 10)
        ridge = 1e-3 * torch.eye(len(rows), dtype=torch.float64)
        expected = kernel[len(rows) :] @ torch.linalg.solve(kernel[: len(rows)] + ridge, y)
        np.testing.assert_allclose(machine.predict(X_val.numpy()), expected.numpy(), atol=1e-6)


def test_the_sign_and_the_score_are_by_the_labels():
    X, y, X_val, y_val = data("tall")
    parts = X.numpy(), y.numpy(), X_val.numpy(), y_val.numpy()
    machine = RecursiveFeatureMachine().fit(*parts)
    flipped = RecursiveFeatureMachine().fit(parts[0], -parts[1], parts[2], -parts[3])
    assert correlation(torch.cat([X, X_val]) @ machine.direction_, torch.cat([y, y_val])) > 0
    np.testing.assert_allclose(flipped.direction_, -machine.direction_, atol=1e-9)
    expected = abs(correlation(X_val @ machine.direction_, y_val))
    assert machine.validation_ == pytest.approx(expected)


def small_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, d = 24, int(torch.randint(4, 40, (), generator=generator))
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.rand(n, generator=generator, dtype=torch.float64)
    X[:, 0] += 3 * y
    return X[:16], y[:16], X[16:], y[16:]


def fitted(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Tensor, Setting]:
    fit = fit_blocks(X[None], y, X_val[None], y_val, iterations=3)
    return fit.directions[0], fit.settings[0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_training_rows_does_not_matter(seed):
    X, y, X_val, y_val = small_problem(seed)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    direction, setting = fitted(X, y, X_val, y_val)
    shuffled, same = fitted(X[order], y[order], X_val, y_val)
    assert same == setting and cosine(direction, shuffled) > 1 - 1e-8


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(-50, 50))
def test_a_vector_added_to_all_rows_does_not_matter(seed, size):
    X, y, X_val, y_val = small_problem(seed)
    shift = size * torch.randn(X.shape[1], generator=torch.Generator().manual_seed(seed))
    direction, setting = fitted(X, y, X_val, y_val)
    shifted, same = fitted(X + shift, y, X_val + shift, y_val)
    assert same == setting and cosine(direction, shifted) > 1 - 1e-6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([-3.0, 0.01, 250.0]))
def test_the_scale_of_the_labels_does_not_matter(seed, scale):
    X, y, X_val, y_val = small_problem(seed)
    direction, setting = fitted(X, y, X_val, y_val)
    scaled, same = fitted(X, scale * y, X_val, scale * y_val)
    assert same == setting and cosine(direction, scaled) > 1 - 1e-8


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_permutation_of_the_features_permutes_the_vector(seed):
    X, y, X_val, y_val = small_problem(seed)
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(seed))
    direction, setting = fitted(X, y, X_val, y_val)
    permuted, same = fitted(X[:, order], y, X_val[:, order], y_val)
    assert same == setting and cosine(direction[order], permuted) > 1 - 1e-8


@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_entry_is_exact_for_flat_and_for_steep_spectra(decay, dtype):
    generator = torch.Generator().manual_seed(1)
    space = RowSpace.of(torch.randn(2, 50, 300, generator=generator))
    factor = torch.randn(2, 3, 50, 50, generator=generator)
    factor = (factor * torch.arange(1, 51) ** -decay).to(dtype)
    few = torch.randn(2, 3, 8, 50, generator=generator).to(dtype)
    left = orthonormal((few @ factor.mT) @ factor @ factor.mT)
    small = left @ factor
    rest = (factor - left.mT @ small).square().sum((-2, -1))
    basis = space.rows.mT @ space.whiten
    expected = (factor.double() @ basis[:, None].mT).square().sum(-2).amax(-1)
    found = largest_entry(factor, space, small, rest)
    torch.testing.assert_close(found, expected.to(dtype))
    scaled = largest_entry(factor * 1e12, space, small * 1e12, rest * 1e24)
    torch.testing.assert_close(scaled, expected.to(dtype) * 1e24)


@pytest.mark.parametrize("gap", [0.5, 1e-3, 0.0])
def test_the_leading_eigenvector_is_exact_whatever_the_gap(gap):
    generator = torch.Generator().manual_seed(2)
    values = torch.linspace(1, 0.5, 60, dtype=torch.float64) - gap
    values[0] = 1
    rotation = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    factor = values.sqrt()[:, None] * rotation
    start = torch.randn(1, 8, 60, generator=generator, dtype=torch.float64)
    pairs = leading_pairs(factor[None], start)
    vector = pairs.vectors[0, 0]
    assert float(vector.norm()) == pytest.approx(1)
    assert float(pairs.values[0, 0]) == pytest.approx(float(values.max()))
    residual = factor.T @ (factor @ vector) - pairs.values[0, 0] * vector
    assert float(residual.norm()) < 1e-10
    if gap:
        assert cosine(vector, rotation[0]) > 1 - 1e-12
    assert float(pairs.gap[0]) == pytest.approx(1 - float(values[1]), abs=1e-6)


def test_a_rank_deficient_block_becomes_orthonormal_with_zero_rows():
    rows = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0]], dtype=torch.float64)
    found = orthonormal(rows, against=torch.tensor([[0.0, 1, 0]], dtype=torch.float64))
    values = torch.linalg.eigvalsh(found @ found.T)
    torch.testing.assert_close(values, torch.tensor([0.0, 0, 1], dtype=torch.float64))
    assert math.isclose(float(found[:, 1].norm()), 0, abs_tol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_gpu_gives_the_vectors_of_the_cpu(dtype):
    parts = [torch.stack([t, t]) for t in data("wide")]
    here, there = fit_blocks(*parts), fit_blocks(*parts, device="cuda", dtype=dtype)
    assert here.settings == there.settings
    assert cosine(here.directions[0], there.directions[0].cpu()) > 0.9999
