"""Operations on the residual stream: what steering does with a stream ``h`` and an addend ``δ``.

``δ = ε v``, the vector times its coefficient, is all that steering knows of a row and a block. Each
operation reads from it what it needs: its direction ``u = δ/|δ|``, its length ``|δ|``, or both. So
ε has one meaning and one unit for all of them, a negative ε turns the direction round, and a row
whose ``δ`` is zero is left as it is. An operation of one's own is a function like these.

For streams in half precision all but addition is computed in float32. Nothing is done in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Stream: TypeAlias = Float[Tensor, "row pos d_model"]
Addend: TypeAlias = Float[Tensor, "row #pos d_model"]
Operation: TypeAlias = Callable[[Stream, Addend], Stream]


def add(resid: Stream, delta: Addend) -> Stream:
    """``h + δ``, as activation steering has it."""
    return resid + delta


def project_out(resid: Stream, delta: Addend) -> Stream:
    """``h - (h·u) u``: nothing is left along the direction; its length does not matter.

    Directional ablation (arXiv 2406.11717). Of two vectors that are not orthogonal, one projected
    out after the other, only the later is gone altogether.
    """
    h, unit, _ = _parts(resid, delta)
    return (h - _along(h, unit) * unit).to(resid.dtype)


def clamp(resid: Stream, delta: Addend) -> Stream:
    """``h + (|δ| - h·u) u``: the projection on the direction becomes ``|δ|`` at every position.

    On the vector itself it becomes ``ε |v|``, so with a negative ε a negative number. For zero,
    where there is no direction, use ``project_out``.
    """
    h, unit, length = _parts(resid, delta)
    return (h + (length - _along(h, unit)) * unit).to(resid.dtype)


def raise_to(resid: Stream, delta: Addend) -> Stream:
    """``h + max(0, |δ| - h·u) u``: ``clamp`` where the projection is below ``|δ|``, else nothing.

    A closed loop: each position is read, and steered only as far as it falls short. With a negative
    ε the projection on the vector is lowered to ``-|δ|`` where it is above.
    """
    h, unit, length = _parts(resid, delta)
    return (h + (length - _along(h, unit)).clamp(min=0) * unit).to(resid.dtype)


def add_keeping_norm(resid: Stream, delta: Addend) -> Stream:
    """``(h + δ) |h| / |h + δ|``: addition, after which the stream is as long as it was.

    However large ε is, it ends at the direction itself. Where ``δ = -h`` the stream stays.
    """
    h, _, _ = _parts(resid, delta)
    moved = h + delta.to(h)
    reached = moved.norm(dim=-1, keepdim=True)
    kept = moved * (h.norm(dim=-1, keepdim=True) / reached)
    return torch.where(reached > 0, kept, h).to(resid.dtype)


def rotate(resid: Stream, delta: Addend) -> Stream:
    """``cos θ h + sin θ |h| w``: ``h`` turned towards the direction, in the plane of both.

    ``w`` is the unit vector of that plane orthogonal to ``h``. The angle is ``θ = |δ| / |h|``, so
    that the end of ``h`` moves along an arc as long as ``δ``, but never past the direction. The
    norm stays. A stream that points exactly away from it has no such plane, and stays.
    """
    h, unit, length = _parts(resid, delta)
    size = h.norm(dim=-1, keepdim=True)
    heading = torch.where(size > 0, h / size, 0.0)
    cosine = _along(heading, unit)
    across = unit - cosine * heading
    sine = across.norm(dim=-1, keepdim=True)
    plane = sine > 1e-6
    angle = torch.minimum(torch.where(size > 0, length / size, 0.0), torch.atan2(sine, cosine))
    aside = torch.where(plane, across / sine, 0.0)
    turned = angle.cos() * h + angle.sin() * size * aside
    return torch.where(plane & (size > 0), turned, h).to(resid.dtype)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "add": add,
        "project_out": project_out,
        "clamp": clamp,
        "raise_to": raise_to,
        "add_keeping_norm": add_keeping_norm,
        "rotate": rotate,
    }
)


def find_operation(operation: Operation | str) -> Operation:
    """The operation of that name, or the function itself; raises ValueError for other names."""
    if callable(operation):
        return operation
    if operation not in OPERATIONS:
        raise ValueError(
            f"operation must be one of {', '.join(OPERATIONS)}, or a function (resid, delta) -> "
            f"resid; got {operation!r}"
        )
    return OPERATIONS[operation]


def find_operations(given: Operation | str | Sequence[Operation | str]) -> tuple[Operation, ...]:
    """One operation, or one for each row; raises ValueError for none, and for unknown names."""
    several = [given] if isinstance(given, str) or callable(given) else given
    found = tuple(find_operation(one) for one in several)
    if not found:
        raise ValueError("operation is empty; give one for all rows, or one for each")
    return found


def apply(operations: Sequence[Operation], resid: Stream, delta: Addend) -> Stream:
    """The stream after an operation on all rows, or after each row's own.

    Raises ``ValueError`` for an operation that returns anything but a stream of the same shape.
    """
    if len(operations) == 1:
        return _done(operations[0], resid, delta)
    changed = resid.clone()
    for operation in {id(each): each for each in operations}.values():
        rows = [row for row, each in enumerate(operations) if each is operation]
        changed[rows] = _done(operation, resid[rows], delta[rows])
    return changed


def _done(operation: Operation, resid: Stream, delta: Addend) -> Stream:
    changed = operation(resid, delta if operation is not add else delta.to(resid.dtype))
    if not isinstance(changed, Tensor) or changed.shape != resid.shape:
        got = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(
            f"operation must return the residual stream {list(resid.shape)} (row, pos, d_model), "
            f"got {got}"
        )
    return changed.to(resid.dtype)


def _parts(resid: Stream, delta: Addend) -> tuple[Stream, Addend, Float[Tensor, "row 1 1"]]:
    """The stream, the addend's direction (zeros where it has none) and its length, in float32."""
    exact = torch.promote_types(resid.dtype, torch.float32)
    h, addend = resid.to(exact), delta.to(resid.device, exact)
    length = addend.norm(dim=-1, keepdim=True)
    return h, torch.where(length > 0, addend / length, 0.0), length


def _along(h: Stream, unit: Addend) -> Float[Tensor, "row pos 1"]:
    return (h * unit).sum(dim=-1, keepdim=True)
