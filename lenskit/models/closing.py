"""Where the prompts of forward passes end: the closing tokens of the template in each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit.models.active import Chunk


class ClosingTokens:
    """Finds a template's closing tokens in pass after pass, with a cache or without one.

    They are the run ``ids`` where it stands last in a row's own tokens, so that those of earlier
    turns are no end. A row of a pass that begins anew must hold the run; of passes that go on from
    a cache only those with a turn more do. Where one token is added to the pass before, without a
    cache, that token was generated: the prompt ends where it did, whatever the model writes.

    ``texts`` name the tokens in messages.
    """

    def __init__(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        self._run, self._texts = torch.tensor(list(ids)), tuple(texts)
        self.forget()

    def forget(self) -> None:
        """Let the next pass be one of other prompts."""
        self._before: tuple[Chunk, Int[Tensor, "row"]] | None = None

    def places(self, chunk: Chunk, needed: Bool[Tensor, "row"]) -> Int[Tensor, "row pos"] | None:
        """1 to K at the closing tokens of a pass, 0 at all others; ``None`` where all are 0.

        Raises ``ValueError`` naming the row for a ``needed`` one in which the tokens should be and
        are not, and for a pass that is given embeddings.
        """
        if chunk.earlier and chunk.length == 1:
            return None
        if chunk.ids is None:
            raise ValueError(
                "closing tokens are found by their ids, but the model is given embeddings "
                "(inputs_embeds)"
            )
        ids, real = chunk.ids, chunk.real[:, -chunk.length :]
        grown = self._before is not None and chunk.follows(self._before[0])
        first = self._before[1] if grown and self._before else self._last(ids, real)
        if not chunk.earlier:
            self._require(chunk, needed, first)
            self._before = chunk, first
        column = torch.arange(chunk.length, device=ids.device) - first[:, None]
        inside = (column >= 0) & (column < len(self._run)) & (first >= 0)[:, None]
        return torch.where(inside, column + 1, 0) if bool(inside.any()) else None

    def _last(self, ids: Tensor, real: Tensor) -> Int[Tensor, "row"]:
        """The column where the last run of each row begins; -1 in a row without one."""
        size = len(self._run)
        if ids.shape[1] < size:
            return ids.new_full(ids.shape[:1], -1)
        same = (ids.unfold(1, size, 1) == self._run.to(ids.device)) & real.unfold(1, size, 1)
        column = torch.arange(same.shape[1], device=ids.device)
        return torch.where(same.all(dim=-1), column, -1).amax(dim=1)

    def _require(self, chunk: Chunk, needed: Tensor, first: Tensor) -> None:
        missing = needed.to(first.device) & (first < 0)
        if not bool(missing.any()):
            return
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"row {row} of the batch, of {int(chunk.real[row].sum())} tokens, does not hold the "
            f"closing tokens {', '.join(map(repr, self._texts))} (ids {self._run.tolist()}) at "
            "which its vectors are added; give the model each whole prompt at once, in the chat "
            "template that the vectors were fitted with (lk.generate, lk.chat_ids)"
        )
