"""Operations on the residual stream against their geometry, in float64 and by explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.operations import (
    OPERATIONS,
    add_keeping_norm,
    clamp,
    find_operation,
    project_out,
    raise_to,
    rotate,
)

ROWS, POSITIONS, WIDTH = 3, 4, 7


def drawn(seed=0, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    resid = torch.randn(ROWS, POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    delta = size * torch.randn(ROWS, 1, WIDTH, generator=generator, dtype=torch.float64)
    return resid.to(dtype), delta.to(dtype)


def along(resid, delta):
    return (resid * delta / delta.norm(dim=-1, keepdim=True)).sum(-1)


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 1e3))
def test_project_out_is_the_projection_matrix_and_knows_no_length(seed, size):
    resid, delta = drawn(seed, size)
    for row in range(ROWS):
        unit = delta[row, 0] / delta[row, 0].norm()
        matrix = torch.eye(WIDTH, dtype=torch.float64) - torch.outer(unit, unit)
        close(project_out(resid, delta)[row], resid[row] @ matrix)
    done = project_out(resid, delta)
    close(project_out(done, delta), done)
    close(project_out(resid, -3 * delta), done)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 1e3))
def test_clamp_sets_the_projection_and_leaves_the_rest(seed, size):
    resid, delta = drawn(seed, size)
    done = clamp(resid, delta)
    close(along(done, delta), delta.norm(dim=-1).expand(-1, POSITIONS), 1e-8)
    close(project_out(done, delta), project_out(resid, delta), 1e-8)
    # A negative coefficient: the projection on the vector itself is negative.
    close(along(clamp(resid, -delta), delta), -delta.norm(dim=-1).expand(-1, POSITIONS), 1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 3))
def test_raising_clamps_where_the_projection_is_below_and_leaves_the_others(seed, size):
    resid, delta = drawn(seed, size)
    done, low = raise_to(resid, delta), along(resid, delta) < delta.norm(dim=-1)
    close(done[low], clamp(resid, delta)[low])
    assert torch.equal(done[~low], resid[~low])
    close(raise_to(done, delta), done)
    lowered = along(raise_to(resid, -delta), delta)
    close(lowered, along(resid, delta).clamp(max=-delta.norm(dim=-1)), 1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 1e3))
def test_adding_keeping_norm_keeps_norm_and_the_direction_of_the_sum(seed, size):
    resid, delta = drawn(seed, size)
    done = add_keeping_norm(resid, delta)
    close(done.norm(dim=-1), resid.norm(dim=-1))
    close(
        torch.cosine_similarity(done, resid + delta, dim=-1), torch.ones(ROWS, POSITIONS).double()
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 10))
def test_rotation_is_the_matrix_that_turns_the_plane_of_stream_and_vector(seed, size):
    resid, delta = drawn(seed, size)
    done = rotate(resid, delta)
    for row in range(ROWS):
        for place in range(POSITIONS):
            h, length = resid[row, place], float(delta[row].norm())
            first = h / h.norm()
            unit = delta[row, 0] / length
            second = unit - (unit @ first) * first
            second = second / second.norm()
            between = math.acos(float(first @ unit))
            angle = min(length / float(h.norm()), between)
            turn = (math.cos(angle) - 1) * (torch.outer(first, first) + torch.outer(second, second))
            turn += math.sin(angle) * (torch.outer(second, first) - torch.outer(first, second))
            close(done[row, place], h + turn @ h, 1e-7)
    close(done.norm(dim=-1), resid.norm(dim=-1))


def test_a_rotation_ends_at_the_direction_and_a_small_one_moves_along_an_arc():
    resid, delta = drawn(1)
    ended = rotate(resid, 1e6 * delta)
    cosine = torch.cosine_similarity(ended, delta.expand_as(ended), dim=-1)
    close(cosine, torch.ones(ROWS, POSITIONS).double())
    moved = (rotate(resid, 1e-4 * delta) - resid).norm(dim=-1)
    close(moved, 1e-4 * delta.norm(dim=-1).expand(-1, POSITIONS), 1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_an_addend_are_bit_identical_and_nothing_is_done_in_place(name, dtype):
    resid, delta = drawn(2, dtype=dtype)
    delta[1] = 0
    before = resid.clone(), delta.clone()
    done = OPERATIONS[name](resid, delta)
    assert torch.equal(done[1], resid[1]) and done.dtype == dtype
    assert torch.equal(resid, before[0]) and torch.equal(delta, before[1])
    assert not torch.allclose(done[0].float(), resid[0].float(), atol=1e-2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_differs_by_its_rounding_alone(name):
    resid, delta = drawn(3, dtype=torch.bfloat16)
    exact = OPERATIONS[name](resid.double(), delta.double())
    torch.testing.assert_close(OPERATIONS[name](resid, delta).double(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_does_not_depend_on_the_rows_and_positions_beside_it(name):
    resid, delta = drawn(4)
    whole = OPERATIONS[name](resid, delta)
    close(OPERATIONS[name](resid[1:2, 2:], delta[1:2]), whole[1:2, 2:])


@pytest.mark.parametrize("name", OPERATIONS)
def test_streams_of_zeros_and_streams_along_the_direction_give_no_nan(name):
    _, delta = drawn(5)
    for resid in (torch.zeros(ROWS, 1, WIDTH).double(), delta, -delta, -2 * delta):
        assert bool(OPERATIONS[name](resid, delta).isfinite().all())
    close(rotate(2 * delta, delta), 2 * delta)
    close(add_keeping_norm(-delta, delta), -delta)


def test_operations_are_found_by_name_and_functions_are_their_own():
    assert find_operation("clamp") is clamp and find_operation(rotate) is rotate
    with pytest.raises(ValueError, match="project_out"):
        find_operation("subtract")
