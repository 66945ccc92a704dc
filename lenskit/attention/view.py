"""What a policy sees of the attention of one block in one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class View:
    """Keys, queries and, when asked for, scores of the heads that are edited.

    ``span`` and ``prompt`` say which keys are emphasised, and which are of the prompt (neither
    padding nor generated); ``first`` which is the prompt's first token. ``place`` numbers the
    tokens of the span, -1 elsewhere. ``steps`` counts the generated tokens: 0 for the queries of
    the prompt, 1 for the first generated token. ``scores`` are the attention scores before the
    softmax under all edits outside this one, ``-inf`` where a key is hidden; ``mass`` is each
    query's attention on the span. A policy that reads neither is *static* and costs a mask; one
    that does needs the scores computed. ``block`` is the number of the block; a policy that reads
    it makes a mask for each block.
    """

    def __init__(
        self,
        place: Int[Tensor, "row 1 1 key"],
        prompt: Bool[Tensor, "row 1 1 key"],
        steps: Int[Tensor, "row 1 query 1"],
        scores: Callable[[], Float[Tensor, "row head query key"]],
        sinks: Float[Tensor, " head"] | None,
        block: int = 0,
        first: Bool[Tensor, "row 1 1 key"] | None = None,
    ) -> None:
        self.place, self.span, self.prompt, self.steps = place, place >= 0, prompt, steps
        self._scores, self._sinks, self.static = scores, sinks, True
        self.first = torch.zeros_like(prompt) if first is None else first
        self._block = block

    @property
    def block(self) -> int:
        """The number of the block."""
        self.static = False
        return self._block

    @property
    def scores(self) -> Float[Tensor, "row head query key"]:
        """Scores before the softmax in float32, ``-inf`` on hidden keys."""
        self.static = False
        return self._scores()

    @property
    def mass(self) -> Float[Tensor, "row head query 1"]:
        """Attention mass on the span, from 0 to 1; a learned sink has its share."""
        scores, sinks = self.scores, self._sinks
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], -1)
            scores = torch.cat([scores, sink], dim=-1)
        pattern = scores.softmax(dim=-1)[..., : self.span.shape[-1]]
        # Padded queries alone see nothing, and have NaN.
        return (pattern * self.span).sum(dim=-1, keepdim=True).nan_to_num(0.0)
