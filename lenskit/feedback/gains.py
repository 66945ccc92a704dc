"""Edits whose strength can be changed from pass to pass, by a gain for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float
from torch import Tensor

from lenskit.models import Edit, applied_edits, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Gated(Edit, Protocol):
    """An edit with a gain: 1 as it was given, 0 not at all, ``None`` as it was given."""

    gain: Float[Tensor, "row #pos"] | None


@contextmanager
def gated(
    model: TransformerBridge, edits: Sequence[AbstractContextManager[Any]]
) -> Iterator[list[Gated]]:
    """Enter contexts of ``steer`` and ``attend``, and yield the edits that they apply.

    Raises ``ValueError`` where they apply none, ``TypeError`` where one has no gain.
    """
    with using(model), ExitStack() as stack:
        before = applied_edits(model)
        for each in edits:
            stack.enter_context(each)
        found = [one for one in applied_edits(model) if not any(one is other for other in before)]
        if not found:
            raise ValueError(
                "edits must be contexts of steer or attend on this model, such as "
                "lk.steer(model, vectors, coefficient=0.04); there are none"
            )
        if strange := [one for one in found if not hasattr(one, "gain")]:
            raise TypeError(
                f"edits must be contexts of steer or attend; {type(strange[0]).__name__} has no "
                "gain that could be set"
            )
        yield found
