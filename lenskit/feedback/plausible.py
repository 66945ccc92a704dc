"""Steering that is weakened where the unsteered model finds its next token implausible."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lenskit._arguments import whole
from lenskit.decoding import CachedPasses, greedy
from lenskit.feedback.gains import Gated, gated
from lenskit.generation import Answer, answer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.generation import Conversation


class PlausibleAnswer(Answer):
    """An ``Answer`` that knows the ``gains`` of its tokens: 1 at full strength, 0 unsteered.

    One for each of ``token_ids``, and one more for the end token of a finished answer.
    """

    gains: tuple[float, ...]

    def __new__(
        cls, text: str, *, finished: bool, token_ids: Sequence[int], gains: Sequence[float]
    ) -> Self:
        made = super().__new__(cls, text, finished=finished, token_ids=token_ids)
        made.gains = tuple(gains)[: len(token_ids) + finished]
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        text, options = super().__getnewargs_ex__()
        return text, options | {"gains": self.gains}


class _Options(TypedDict, total=False):
    threshold: float
    tries: int
    max_new_tokens: int
    batch_size: int
    template_arguments: Mapping[str, Any] | None
    progress: bool


@overload
def generate_plausible(
    model: TransformerBridge,
    questions: str,
    *edits: AbstractContextManager[Any],
    **options: Unpack[_Options],
) -> PlausibleAnswer: ...
@overload
def generate_plausible(
    model: TransformerBridge,
    questions: Sequence[str | Conversation],
    *edits: AbstractContextManager[Any],
    **options: Unpack[_Options],
) -> list[PlausibleAnswer]: ...
def generate_plausible(
    model: TransformerBridge,
    questions: str | Sequence[str | Conversation],
    *edits: AbstractContextManager[Any],
    threshold: float = 0.5,
    tries: int = 4,
    max_new_tokens: int = 50,
    batch_size: int = 256,
    template_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> PlausibleAnswer | list[PlausibleAnswer]:
    """Answer greedily, with edits that are weakened until the model itself finds a token plausible.

    ``edits``: contexts of ``steer`` and ``attend``, which are entered here. The steered model's
    token ``x`` is taken if ``p(x) >= threshold · max p``, ``p`` being the next token's distribution
    without the edits, behind the same text. Otherwise the step is run again at half the strength,
    a quarter and so on, ``tries`` strengths in all; where none will do, ``p``'s own most probable
    token is taken and the step run unsteered. So 0 is plain steering and 1 the unsteered model. At
    the first token the whole prompt is such a step. Every token costs two passes, and for each
    weaker strength one more over the whole batch; memory holds two caches.

    After Directer (arXiv 2603.06745, threshold 0.5), which scales the keys of an instruction, drops
    the half of the steered layers that matters least instead of halving a coefficient, and begins
    every step from an unsteered history; here the history is what the accepted steps made it.

    Returns one ``PlausibleAnswer`` for one text and a list for a list; the other options are those
    of ``generate``. Raises ValueError for a threshold that is not from 0 to 1, and what
    ``generate`` and ``regulate`` raise.

    >>> strong = lk.steer(model, vectors, coefficient=0.2)
    >>> answer = lk.generate_plausible(model, concept.questions[0], strong, max_new_tokens=3)
    >>> len(answer.gains) >= len(answer.token_ids)
    True
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    tries = whole("tries", tries, 1)
    several = [questions] if isinstance(questions, str) else questions
    gains: dict[int, list[float]] = {}

    with gated(model, edits) as found:

        def passes(rows: Int[Tensor, "row"]) -> WeakenedPasses:
            gains.update((row, []) for row in rows.tolist())
            own = [gains[row] for row in rows.tolist()]
            return WeakenedPasses(model, found, threshold, tries, own)

        answers = answer(
            model,
            several,
            passes,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            template_arguments=template_arguments,
            progress=progress,
        )
    finished = [
        PlausibleAnswer(
            str(one), finished=one.finished, token_ids=one.token_ids, gains=gains.get(row, ())
        )
        for row, one in enumerate(answers)
    ]
    return finished[0] if isinstance(questions, str) else finished


class WeakenedPasses:
    """Each pass unsteered and steered, the latter again and weaker until its token is plausible.

    ``gains``: a list for each row, to which the gain of each of its tokens is added.
    """

    def __init__(
        self,
        model: TransformerBridge,
        edits: Sequence[Gated],
        threshold: float,
        tries: int,
        gains: Sequence[list[float]],
    ) -> None:
        self._plain, self._steered = CachedPasses(model), CachedPasses(model)
        self._edits, self._tries, self._gains = edits, tries, list(gains)
        # Of one row, differences of logits are those of log-probabilities.
        self._below = -math.log(threshold) if threshold > 0 else math.inf

    def __call__(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row key"],
        positions: Int[Tensor, "row pos"],
    ) -> Float[Tensor, "row vocab"]:
        """The steered logits of rows whose token is plausible, the unsteered ones of others."""
        gain = torch.ones(len(ids), 1, device=ids.device)
        self._set(torch.zeros_like(gain))
        plain = self._plain(ids, mask, positions)
        known = plain.float()
        least = known.gather(1, greedy(plain)[:, None]) - self._below
        before = self._steered.cache
        for trial in range(self._tries + 1):
            self._steered.cache = twin(before)
            self._set(gain)
            steered = self._steered(ids, mask, positions)
            token = greedy(steered)[:, None].to(known.device)
            plausible = (gain == 0) | (known.gather(1, token) >= least)
            if bool(plausible.all()):
                break
            weaker = 0.5 ** (trial + 1) if trial + 1 < self._tries else 0.0
            gain = torch.where(plausible, gain, weaker)
        for own, one in zip(self._gains, gain[:, 0].tolist(), strict=True):
            own.append(one)
        return torch.where(gain > 0, steered, plain)

    def keep(self, rows: Int[Tensor, "row"]) -> bool:
        """Go on with these rows alone."""
        if not all([self._plain.keep(rows), self._steered.keep(rows)]):
            return False
        self._gains = [self._gains[row] for row in rows.tolist()]
        return True

    def _set(self, gain: Float[Tensor, "row 1"]) -> None:
        for edit in self._edits:
            edit.gain = gain


def twin(cache: Any) -> Any:
    """A cache that can grow while the other stays; both share what they hold now.

    Raises ValueError for a cache without layers.
    """
    if cache is None:
        return None
    if not hasattr(cache, "layers"):
        raise ValueError(f"{type(cache).__name__} has no layers, so that no pass can be run again")
    made = copy.copy(cache)
    # A dynamic layer makes new tensors when it grows; others may write into theirs.
    made.layers = [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return made
