"""What a closed loop reads in every pass: a number for each row, at its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.intervention import Intervention
from lenskit.models import RESID, Edit, chunk_of, require_rows
from lenskit.steering import intervention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import Vectors


class Reader(Edit, Protocol):
    """An edit that changes nothing, and knows what it read in the last pass."""

    @property
    def reading(self) -> Float[Tensor, "row"]:
        """A number for each row, NaN where there is nothing to read; raises where none was."""


Monitor: TypeAlias = "Callable[[TransformerBridge], Reader]"


@dataclass(frozen=True, repr=False)
class Projection(Displayed):
    """A monitor: how far the residual stream has gone along a vector, behind ``block``.

    The reading is ``h·v / |v|²`` at the last token, with ``v`` what ``steer`` adds there with
    coefficient 1: it is in the unit of the coefficients, and is ε where ``operation="clamp"`` with
    ε would change nothing. The stream is read as it is steered. ``vectors`` and ``relative`` as in
    ``steer``; with a vector for each row, ``None`` is a row that is not read, and never steered.

    >>> watched = lk.Projection(vectors, block=3)
    """

    vectors: Vectors | Sequence[Vectors | None]
    block: int
    relative: bool | None = None

    def __call__(self, model: TransformerBridge) -> ProjectionReader:
        """What reads it; raises ValueError for vectors that have no direction at the block."""
        block = whole("block", self.block, 0, model.cfg.n_layers - 1)
        planned = intervention(model, self.vectors, 1.0, blocks=[block], relative=self.relative)
        if planned.closing:
            raise ValueError(
                "vectors are for each closing token, so that other tokens have none to be "
                "projected on; give vectors of one token for each block"
            )
        if not bool(planned.deltas().any()):
            raise ValueError(f"vectors are zero at block {block}; choose another block")
        return ProjectionReader(planned)


class ProjectionReader:
    """Reads the projection in every pass and changes nothing."""

    what = "a projection is read"

    def __init__(self, planned: Intervention) -> None:
        self.number = None if planned.shared else len(planned.weights)
        self._block = planned.blocks[0]
        addend = planned.deltas()[0]
        self._along = addend / addend.square().sum(dim=1, keepdim=True)  # NaN for no direction
        self._read: Float[Tensor, "row"] | None = None
        self.batch(None)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows the next batches hold; ``None``: all of them."""
        self._own = self._along if rows is None or self.number is None else self._along[rows.cpu()]

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Forget the other rows."""
        if self.number is not None:
            self._own = self._own[rows.cpu()]
        if self._read is not None:
            self._read = self._read[rows.cpu()]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the last tokens of the coming pass."""
        chunk = chunk_of(args, kwargs)
        require_rows(self, len(self._own), chunk.rows)
        self._last, self._read = chunk.last, None

    def hooks(self) -> list[tuple[str, Any]]:
        """One hook on the residual stream."""
        return [(f"blocks.{self._block}.{RESID}", self._look)]

    def _look(self, resid: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        rows = torch.arange(len(resid), device=resid.device)
        last = resid[rows, self._last.to(resid.device)].detach().double().cpu()
        self._read = (last * self._own).sum(dim=1)
        return resid

    @property
    def reading(self) -> Float[Tensor, "row"]:
        """The projections of the last pass; raises ValueError where it ended before the block."""
        if self._read is None:
            raise ValueError(f"the residual stream of block {self._block} was not read in the pass")
        return self._read
