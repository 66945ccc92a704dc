"""How much of its attention each row's last token pays to a span: what a closed loop can watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._display import Displayed
from lenskit.attention.edit import ActiveAttention, AttentionEdit
from lenskit.attention.heads import Heads
from lenskit.attention.span import Span
from lenskit.attention.view import View
from lenskit.models import SCORES, Scores, chunk_of, model_report

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class AttentionMass(Displayed):
    """A monitor: the last token's attention mass on a span (0 to 1), the mean over ``heads``.

    ``span``: one for all rows, or one for each (``None``: the row is not read, and never steered).
    ``heads``: by default all. The mass is that of the model as it is edited, a learned sink having
    its share. Cost: the scores of the blocks with these heads.

    >>> question = "Answer in one word. What is rain?"
    >>> span = lk.span(model, question, "Answer in one word.")
    >>> watched = lk.AttentionMass(span, lk.Heads({2: [0, 3]}))
    """

    span: Span | Sequence[Span | None]
    heads: Heads | None = None

    def __call__(self, model: TransformerBridge) -> MassReader:
        """What reads it; raises ``ModelCheckError`` for a model without scores to be read."""
        model_report(model).require_edit(SCORES)
        shared = isinstance(self.span, Span)
        spans = [self.span] if isinstance(self.span, Span) else list(self.span)
        edits = [None if one is None else AttentionEdit(one, _nothing, self.heads) for one in spans]
        if not any(edits):
            raise ValueError("span holds no span; give at least one row something to attend to")
        return MassReader(model, edits, shared)


class MassReader(ActiveAttention):
    """Reads the mass in every pass and changes nothing."""

    what = "attention is read"

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the span's keys and the last queries of the coming pass."""
        super().before_forward(module, args, kwargs)
        chunk = chunk_of(args, kwargs)
        self._last = chunk.last[:, None, None, None]
        self._read: dict[int, Float[Tensor, "row"]] = {}

    def change(self, scores: Scores) -> None:
        """Read a block's mass."""
        if scores.block not in self.blocks:
            return

        def of_last() -> Tensor:
            values = scores.values()
            at = self._last.to(values.device).expand(-1, values.shape[1], -1, values.shape[3])
            return values.gather(2, at)

        seen = self.view(scores)
        mass = View(seen.place, seen.prompt, seen.steps, of_last, scores.sinks).mass[:, :, 0, 0]
        chosen = self._gate[:, scores.block].to(mass.device)
        self._read[scores.block] = torch.where(chosen, mass, 0.0).sum(dim=1).cpu()

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Forget the other rows."""
        super().keep(rows)
        self._read = {block: read[rows.cpu()] for block, read in self._read.items()}

    @property
    def reading(self) -> Float[Tensor, "row"]:
        """The mass of the last pass, NaN in rows without a span.

        Raises ``ValueError`` where the pass ended before the last of these blocks.
        """
        if missing := set(self.blocks) - set(self._read):
            raise ValueError(f"attention of block(s) {sorted(missing)} was not read in the pass")
        return sum(self._read.values(), torch.tensor(0.0)) / self._gate.flatten(1).sum(dim=1)


def _nothing(view: View) -> Tensor:
    return torch.zeros_like(view.span, dtype=torch.float32)
