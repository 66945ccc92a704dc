"""Hard labels, and soft ones from the attention of all heads (AGS, Eq. 4)."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.selector import TokenSelection, pool_heads


def soft_labels(
    capture: Capture,
    tokens: TokenSelection,
    *,
    heads: Literal["mean", "max"] = "mean",
    constant: Literal["raise", "hard"] = "raise",
) -> Float[Tensor, "prompt layer"]:
    """Attention from the selected token to the prefix, scaled to [0, 1] per block (AGS, Eq. 4).

    ``y[p,l] = a[p,l,t_l]`` for a prompt with a prefix and 0 for one without, then min-max scaled
    over the prompts of the capture. ``heads`` as in ``select_tokens``.

    Where all labels of a block are equal (the prefix lies outside a sliding window, say) there
    is no scale: ``constant="raise"`` raises ``ValueError`` naming the blocks, ``"hard"`` gives
    them the hard labels. Raises ``ValueError`` for a selection among other candidates or blocks.

    >>> labels = lk.soft_labels(capture, lk.select_tokens(capture))
    >>> float(labels.min()), float(labels.max())
    (0.0, 1.0)
    """
    if constant not in ("raise", "hard"):
        raise ValueError(f"constant must be 'raise' or 'hard', got {constant!r}")
    tokens.check(capture.candidates, capture.layers)
    hard = hard_labels(capture)
    labels = tokens.take(pool_heads(capture.attention_to_prefix, heads)) * hard
    low, high = labels.amin(dim=0), labels.amax(dim=0)
    flat = high == low
    if bool(flat.any()):
        if constant == "raise":
            blocks = ", ".join(map(str, flat.nonzero().flatten().tolist()))
            raise ValueError(
                f"attention to the prefix is the same in all prompts at block(s) {blocks}, so "
                "soft labels are undefined there; pass constant='hard', or use hard_labels"
            )
        high = high.masked_fill(flat, 1.0)
        low = low.masked_fill(flat, 0.0)
        labels = labels.where(~flat, hard)
    return (labels - low) / (high - low)


def hard_labels(
    capture: Capture, tokens: TokenSelection | None = None
) -> Float[Tensor, "prompt layer"]:
    """1 for a prompt with the prefix and 0 for one without, the same at every block.

    ``tokens`` is not used, but must fit; it is there so that both kinds of labels are called
    alike.

    >>> lk.hard_labels(capture)[:4, 0]
    tensor([1., 0., 1., 0.])
    """
    if tokens is not None:
        tokens.check(capture.candidates, capture.layers)
    prefixed = capture.prompts.has_prefix.float()
    return prefixed[:, None].expand(-1, capture.layers).clone()
