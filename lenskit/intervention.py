"""An intervention on the residual stream: what each row gets at each block, and the edit at work.

``lenskit.steering`` makes it from what a user gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.models import ClosingTokens, applied, cache_of, chunk_of, position_ids, require_rows
from lenskit.operations import Operation, add, apply

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NEVER = torch.iinfo(torch.long).max

Positions: TypeAlias = Literal["all", "prompt", "generated", "answer"]
"""Which tokens of a row are steered: all, those of its prompt, those that are generated, or those
that the answer is written from: the last one of the prompt and the generated ones."""

Window: TypeAlias = tuple[int, int | None]
"""From which position on a row is steered, and before which (``None``: up to its end)."""


@dataclass(frozen=True)
class Intervention:
    """What is added to the residual stream: ``Σ_v weights[row, v] directions[v, block]``.

    ``directions``: one entry for each set of vectors, at the blocks listed in ``blocks`` only and
    already in the unit of the coefficients. ``weights``: the coefficients of every row of the
    batch; a single row is shared by all of them, a row of zeros is not steered. ``start``: the
    first absolute position that is steered. ``closing`` and ``candidates``: ids and texts of the
    closing tokens, where vectors are for these; ``directions`` then have places: what is added at
    all other tokens, and at each closing token. ``operations``: what is done with the sum, one for
    all rows or one for each. ``windows``: the positions of each row that are steered, beside
    ``start``; empty where all are.
    """

    directions: Float[Tensor, "vector block *place d_model"]
    weights: Float[Tensor, "row vector"]
    blocks: tuple[int, ...]
    start: int = 0
    closing: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = (add,)
    windows: tuple[Window, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one row of weights serves a batch of any size."""
        return self.weights.shape[0] == 1

    @property
    def placed(self) -> Bool[Tensor, "row"]:
        """The rows to which closing tokens matter."""
        own = (self.directions[:, :, 1:] != self.directions[:, :, :1]).flatten(1).any(dim=1)
        return self.weights[:, own].any(dim=1)

    def deltas(
        self, rows: Int[Tensor, "row"] | None = None
    ) -> Float[Tensor, "block row *place d_model"]:
        """What each block adds to each row (to ``rows`` of them, in that order), in float64."""
        weights = self.weights if rows is None or self.shared else self.weights[rows]
        used = weights.any(dim=0)  # a batch of a large study uses few of its vectors
        return torch.einsum(
            "rv,vb...d->br...d", weights[:, used].double(), self.directions[used].double()
        )


def window(positions: Positions, length: int) -> Window:
    """The window of a row whose prompt has so many tokens; ValueError for other positions."""
    if positions not in get_args(Positions):
        raise ValueError(
            f"positions must be one of {', '.join(get_args(Positions))}; got {positions!r}"
        )
    return {"generated": (length, None), "answer": (length - 1, None), "prompt": (0, length)}.get(
        positions, (0, None)
    )


@contextmanager
def intervene(model: TransformerBridge, planned: Intervention) -> Iterator[None]:
    """Apply an intervention to every forward pass inside the context."""
    with applied(model, ActiveIntervention(planned)):
        yield


class ActiveIntervention:
    """An intervention at work: the rows that the next forward pass holds, and their positions.

    A generation loop that reorders or drops rows says so with ``batch`` and ``keep``, so that
    every row keeps its own vectors. ``gain``: by what the coefficients of the coming pass are
    multiplied at each position; ``None``: by nothing.
    """

    what = "steering has coefficients"

    def __init__(self, planned: Intervention) -> None:
        self.planned = planned
        self._gate: Tensor | None = None
        self._place: Tensor | None = None
        self.gain: Float[Tensor, "row #pos"] | None = None
        self._closing = ClosingTokens(planned.closing, planned.candidates)
        self._placed = planned.placed if planned.closing else None
        self.batch(None)

    @property
    def number(self) -> int | None:
        """For how many rows it was made; ``None`` serves a batch of any size."""
        return None if self.planned.shared else len(self.planned.weights)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows of the intervention the next batches hold; ``None``: all of them."""
        self._rows = torch.arange(len(self.planned.weights)) if rows is None else rows.cpu()
        self._deltas: list[Tensor] = []
        self._closing.forget()

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""
        if not self.planned.shared:
            self._rows = self._rows[rows.cpu()]
            self._deltas = [delta[rows.to(delta.device)] for delta in self._deltas]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the number of rows, and find the steered positions of this chunk of tokens."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        require_rows(self, len(self._rows), tokens.shape[0])
        if self.planned.start > 0 or self.planned.windows:
            self._gate = self._inside(_positions(tokens, kwargs))[:, :, None]
        if self._placed is not None:
            needed = self._placed if self.planned.shared else self._placed[self._rows]
            self._place = self._closing.places(chunk_of(args, kwargs), needed)

    def hooks(self) -> list[tuple[str, Any]]:
        """Hook names and functions, for ``model.hooks(fwd_hooks=...)``."""
        return [
            (f"blocks.{block}.hook_resid_post", partial(self._add, i))
            for i, block in enumerate(self.planned.blocks)
        ]

    def _inside(self, positions: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        inside = positions >= self.planned.start
        if not self.planned.windows:
            return inside
        rows = [self.planned.windows[row] for row in self._rows.tolist()]
        first = torch.tensor([each for each, _ in rows], device=positions.device)
        stop = torch.tensor([_NEVER if s is None else s for _, s in rows], device=positions.device)
        return inside & (positions >= first[:, None]) & (positions < stop[:, None])

    def _add(self, i: int, resid: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        if not self._deltas:
            deltas = self.planned.deltas(self._rows)
            self._deltas = list(deltas if self.planned.closing else deltas[:, :, None])
        delta = self._deltas[i]
        plainly = self.planned.operations == (add,)
        # Norms and angles are of the vector as it is, whatever the stream is rounded to.
        exact = resid.dtype if plainly else torch.promote_types(resid.dtype, torch.float32)
        if delta.dtype != exact or delta.device != resid.device:
            delta = self._deltas[i] = delta.to(exact).to(resid.device)
        delta = self._at_places(delta)
        if self.gain is not None:
            delta = delta * self.gain.to(delta)[:, :, None]
        # Never in place: the stream may be what another hook has kept.
        if self._gate is None:
            return resid + delta if plainly else self._changed(resid, delta)
        if plainly:
            self._gate = self._gate.to(resid)
            return torch.addcmul(resid, self._gate, delta)
        self._gate = self._gate.to(resid.device, torch.bool)
        return torch.where(self._gate, self._changed(resid, delta), resid)

    def _changed(
        self, resid: Float[Tensor, "row pos d_model"], delta: Float[Tensor, "row #pos d_model"]
    ) -> Tensor:
        """The stream after each row's own operation."""
        planned = self.planned.operations
        own = planned if len(planned) == 1 else [planned[row] for row in self._rows.tolist()]
        return apply(own, resid, delta)

    def _at_places(self, delta: Float[Tensor, "row place d_model"]) -> Tensor:
        """What is added at each position of this pass; one entry where it is the same at all."""
        if self._place is None:
            return delta[:, :1]
        place = self._place.to(delta.device)[:, :, None].expand(-1, -1, delta.shape[-1])
        return delta.expand(len(place), -1, -1).gather(1, place)


def _positions(tokens: Tensor, kwargs: dict[str, Any]) -> Int[Tensor, "row pos"]:
    """Absolute positions of a chunk, which may follow others that are in the cache."""
    chunk = tokens.shape[1]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return position_ids(mask)[:, -chunk:]
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return positions
    if mask is not None:
        raise ValueError("start > 0 needs a two-dimensional attention_mask, or position_ids")
    cache = cache_of(kwargs)
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + chunk, device=tokens.device)[None]
