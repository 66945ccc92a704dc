"""The context in which edits act only while a closed loop asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._display import Displayed, count
from lenskit.feedback.gains import Gated, gated
from lenskit.feedback.loop import ClosedLoop
from lenskit.feedback.monitors import Reader
from lenskit.models import Chunk, applied, chunk_of, unwatched

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class LoopRecord(Displayed):
    """What a loop read and did in the last passes of each row, in the order of the rows.

    ``readings[row][i]`` decided about the gain ``gains[row][i]`` of pass ``i``: 0 is the prompt's,
    1 that of the first generated token. (A row that has ended stays in its batch for some passes.)
    """

    def __init__(self) -> None:
        self._of_row: dict[int, list[tuple[float, float]]] = {}

    @property
    def readings(self) -> list[list[float]]:
        """What was read before each pass."""
        return [[reading for reading, _ in self._of_row[row]] for row in sorted(self._of_row)]

    @property
    def gains(self) -> list[list[float]]:
        """The gain of each pass, from 0 to 1."""
        return [[gain for _, gain in self._of_row[row]] for row in sorted(self._of_row)]

    def begin(self, rows: Sequence[int]) -> None:
        """Rows have new prompts."""
        self._of_row |= {row: [] for row in rows}

    def add(self, rows: Sequence[int], reading: Sequence[float], gain: Sequence[float]) -> None:
        """The next pass of some rows."""
        for row, *own in zip(rows, reading, gain, strict=True):
            self._of_row[row].append((own[0], own[1]))

    def _headline(self) -> str:
        return f"LoopRecord of {count(len(self._of_row), 'row')}"

    def _rows(self) -> dict[str, object]:
        return {
            f"row {row}": f"steered in {sum(gain > 0 for _, gain in own)} of {len(own)} passes, "
            f"mean gain {sum(gain for _, gain in own) / max(1, len(own)):.2f}"
            for row, own in sorted(self._of_row.items())
        }


@contextmanager
def regulate(
    model: TransformerBridge, loop: ClosedLoop, *edits: AbstractContextManager[Any]
) -> Iterator[LoopRecord]:
    """Apply edits to a row only while the loop asks for them: a closed loop with a state.

    ``edits``: contexts of ``steer`` and ``attend``, which are entered here and share the loop's
    gain: it multiplies the coefficients and the biases (an operation that needs no coefficient,
    and a bias of ``-inf``, are on for every gain above 0). What is read at a row's token decides
    about its next one. A prompt is first read without the edits, and then edited as a whole or not
    at all, by what its last token showed; that reading is one more pass over the prompt, which
    hooks of others do not see. Further passes cost the monitor's reading alone.

    Rows are independent, whatever their padding; that holds for plain passes, ``generate`` and
    cached generation of Hugging Face, with a cache or without one. Not for beams, which exchange
    rows. Yields a ``LoopRecord``.

    Raises ValueError for contexts that apply nothing to this model, where the monitor's block is
    not reached, and for a pass behind a cache that was not made inside.

    >>> loop = lk.ClosedLoop(lk.Projection(vectors, block=3), low=0.05, hold=1)
    >>> with lk.regulate(model, loop, lk.steer(model, vectors, coefficient=0.04)) as record:
    ...     answer = lk.generate(model, concept.questions[0], max_new_tokens=4)
    >>> len(record.readings[0])
    4
    """
    with gated(model, edits) as found:
        reader = loop.monitor(model)
        active = ActiveLoop(model, loop, found, reader)
        # The reader's own beginning of a pass comes after the loop has used what it read before.
        with applied(model, active), applied(model, reader):
            yield active.record


class ActiveLoop:
    """A loop at work: the state of each row, and the gain of every position it has seen."""

    what = "a loop is closed"
    number: int | None = None

    def __init__(
        self, model: TransformerBridge, loop: ClosedLoop, edits: Sequence[Gated], reader: Reader
    ) -> None:
        self.record = LoopRecord()
        self._model, self._loop, self._edits, self._reader = model, loop, edits, reader
        self._reading_first = False
        self.batch(None)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows the next batches hold; ``None``: all of them."""
        self._given = None if rows is None else rows.tolist()
        self._before: Chunk | None = None
        self._gains: Float[Tensor, "row key"] | None = None
        self._asked: Float[Tensor, "row held"]
        self._rows: list[int]

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""
        self._before = None
        if self._gains is not None:
            kept = rows.cpu()
            self._gains, self._asked = self._gains[kept], self._asked[kept]
            self._rows = [self._rows[row] for row in kept.tolist()]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the gains of the coming pass."""
        if self._reading_first:
            return
        chunk = chunk_of(args, kwargs)
        if chunk.earlier:
            self._require_seen(chunk)
        elif not chunk.follows(self._before):
            self._begin(chunk)
            self._read_prompt(module, args, kwargs, chunk)
        self._before = None if chunk.earlier else chunk
        assert self._gains is not None
        reading = self._reader.reading.double().cpu().expand(chunk.rows)
        asked = self._loop.asked(reading, self._asked[:, -1])
        self._asked = torch.cat([self._asked[:, 1:], asked[:, None]], dim=1)
        gain = self._asked.amax(dim=1)
        self.record.add(self._rows, reading.tolist(), gain.tolist())
        new = chunk.real.shape[1] - self._gains.shape[1]
        self._gains = torch.cat([self._gains, gain[:, None].expand(-1, new)], dim=1)
        self._set(self._gains[:, -chunk.length :].to(chunk.real.device))

    def hooks(self) -> list[tuple[str, Any]]:
        """None: what is changed is what other edits do."""
        return []

    def _begin(self, chunk: Chunk) -> None:
        self._rows = list(range(chunk.rows)) if self._given is None else self._given
        if len(self._rows) != chunk.rows:
            raise ValueError(f"the loop is for {len(self._rows)} rows, the batch has {chunk.rows}")
        self._asked = torch.zeros(chunk.rows, self._loop.hold + 1, dtype=torch.float64)
        self._gains = torch.zeros(chunk.rows, 0, dtype=torch.float64)
        self.record.begin(self._rows)

    def _read_prompt(self, module: Any, args: tuple, kwargs: dict[str, Any], chunk: Chunk) -> None:
        """Run the prompt once without the edits, so that the reader has read it."""
        plainly = {key: own for key, own in kwargs.items() if key not in _CACHE}
        self._set(torch.zeros(chunk.rows, 1, device=chunk.real.device))
        self._reading_first = True
        try:
            with torch.no_grad(), unwatched(self._model):
                module(*args, **plainly, use_cache=False)
        finally:
            self._reading_first = False

    def _require_seen(self, chunk: Chunk) -> None:
        seen = None if self._gains is None else tuple(self._gains.shape)
        if seen != (chunk.rows, chunk.earlier):
            own = "nothing" if seen is None else f"{seen[0]} rows of {seen[1]} tokens"
            raise ValueError(
                f"the pass goes on from a cache of {chunk.rows} rows of {chunk.earlier} tokens, "
                f"but the loop has seen {own}; run each prompt and all that follows it once, "
                "inside the loop's context"
            )

    def _set(self, gain: Float[Tensor, "row #pos"]) -> None:
        for edit in self._edits:
            edit.gain = gain


_CACHE = ("past_key_values", "cache", "use_cache")
