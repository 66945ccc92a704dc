"""Labels by name, by a function, or as numbers of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.labels.activity import activity_labels
from lenskit.labels.attention import hard_labels, soft_labels
from lenskit.labels.divergence import divergence_labels
from lenskit.labels.gating import gating_labels, gating_or_hard_labels
from lenskit.selector import TokenSelection

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LABELS: Mapping[str, Callable[[Capture, TokenSelection], Float[Tensor, "prompt layer"]]] = (
    MappingProxyType(
        {
            "soft": soft_labels,
            "hard": hard_labels,
            "gating": gating_labels,
            "gating or hard": gating_or_hard_labels,
            "divergence": divergence_labels,
            "true activity": activity_labels,
        }
    )
)


def find_labels(
    capture: Capture,
    tokens: TokenSelection,
    labels: Any,
    model: TransformerBridge | None = None,
) -> Float[Tensor, "prompt layer"]:
    """Labels from a name, from a function of capture and selection, or from numbers.

    ``labels``: a name in ``LABELS``, a function, or a tensor, array or list [prompt, layer], or one
    number for each prompt, which serves every block. ``model``: that of the capture, which
    "divergence" needs. Raises ``ValueError`` for other names and
    shapes.
    """
    if isinstance(labels, str):
        if labels not in LABELS:
            raise ValueError(
                f"labels must be one of {', '.join(LABELS)}, or numbers; got {labels!r}"
            )
        if labels == "divergence":
            return divergence_labels(capture, tokens, model=model)
        return LABELS[labels](capture, tokens)
    if callable(labels):
        labels = labels(capture, tokens)
    try:
        made = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be numbers [prompt, layer]: {error}") from error
    shape = capture.resid_post.shape[:2]
    if made.shape == shape[:1]:
        made = made[:, None].expand(*shape)
    if made.shape != shape:
        raise ValueError(
            f"labels must be [prompt, layer] = {list(shape)} as the capture, or one for each "
            f"prompt; got {list(made.shape)}"
        )
    return made.float() if made.dtype in (torch.bool, torch.int64, torch.int32) else made
