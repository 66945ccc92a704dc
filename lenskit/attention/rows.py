"""Which row of a batch has which edit of attention, and where its span stands in a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit.models import Chunk, chunk_of, require_rows

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.attention.edit import AttentionEdit


@dataclass(frozen=True)
class Located:
    """The keys of one pass: their ``positions`` in the row's own tokens, -1 on padding.

    ``place`` numbers the tokens of the span, -1 elsewhere. ``length``: that of the prompt, 0 for a
    row without an edit.
    """

    chunk: Chunk
    positions: Int[Tensor, "row key"]
    place: Int[Tensor, "row key"]
    length: Int[Tensor, "row 1"]


class EditedRows:
    """Edits of one kind, one or none for each row of the batch (``shared``: a single one for all).

    It follows the rows that a generation loop reorders or drops.
    """

    what = "attention is edited"

    def __init__(
        self, model: TransformerBridge, edits: Sequence[AttentionEdit | None], shared: bool
    ) -> None:
        self._edits, self._shared = tuple(edits), shared
        every = torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.bool)
        none = torch.zeros_like(every)
        masks: dict[Any, Tensor] = {}
        for edit in edits:
            heads = None if edit is None else edit.heads
            if edit is not None and heads not in masks:
                masks[heads] = every if heads is None else heads.mask(model)
        self._heads: Bool[Tensor, "row block head"] = torch.stack(
            [none if e is None else masks[e.heads] for e in edits]
        )
        width = max(0 if edit is None else edit.span.length for edit in edits)
        self._lengths = torch.tensor([0 if e is None else e.span.length for e in edits])
        self._ids = torch.full((len(edits), width), -1)
        # One more than the place in the span, so that 0 is outside.
        self._places = torch.zeros_like(self._ids)
        for row, edit in enumerate(edits):
            if edit is not None:
                self._ids[row, : edit.span.length] = torch.tensor(edit.span.ids)
                self._places[row, list(edit.span.positions)] = torch.arange(len(edit.span)) + 1
        self._rows = torch.arange(len(edits))

    @property
    def number(self) -> int | None:
        """For how many rows it was made; ``None`` serves a batch of any size."""
        return None if self._shared else len(self._edits)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows the next batches hold; ``None``: all of them."""
        self._rows = torch.arange(len(self._edits)) if rows is None or self._shared else rows.cpu()

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""
        if not self._shared:
            self._rows = self._rows[rows.cpu()]

    def located(self, args: tuple, kwargs: dict[str, Any]) -> Located:
        """Where the keys of the coming pass stand; raises where the prompt is another one."""
        chunk = chunk_of(args, kwargs)
        require_rows(self, len(self._rows), chunk.rows)  # type: ignore[arg-type]
        positions, length = chunk.positions, self._lengths[self._rows, None].to(chunk.real.device)
        if chunk.earlier == 0:
            _require_prompt(chunk, positions, self._ids[self._rows], length)
        place = at_positions(self._places[self._rows], positions) - 1
        return Located(chunk, positions, place, length)


def at_positions(
    given: Int[Tensor, "row pos"] | Bool[Tensor, "row pos"], positions: Int[Tensor, "row key"]
) -> Tensor:
    """What is given for each position of the prompt, at some of them; 0 behind and on padding."""
    width = given.shape[1]
    inside = (positions >= 0) & (positions < width)
    at = positions.clamp(0, max(width - 1, 0))
    return given.to(at.device).expand(len(at), -1).gather(1, at).masked_fill(~inside, 0)


def _require_prompt(
    chunk: Chunk,
    positions: Int[Tensor, "row key"],
    ids: Int[Tensor, "row pos"],
    length: Int[Tensor, "row 1"],
) -> None:
    """Raise ``ValueError`` unless each edited row begins with the prompt that its span is of."""
    if chunk.ids is None:
        raise ValueError(
            "spans are of token ids, but the model is given embeddings (inputs_embeds)"
        )
    compared = (positions >= 0) & (positions < length)
    same = ~compared | (at_positions(ids, positions) == chunk.ids)
    fits = same.all(dim=1) & (compared.sum(dim=1) == length[:, 0])
    if not bool(fits.all()):
        row = int((~fits).nonzero()[0])
        tokens = int(chunk.real[row].sum())
        raise ValueError(
            f"row {row} of the batch, of {tokens} tokens, does not begin with the prompt of "
            f"{int(length.expand(chunk.rows, -1)[row])} tokens that its span is of; make the span "
            "of the same messages (lk.span), one for each row where they differ"
        )
