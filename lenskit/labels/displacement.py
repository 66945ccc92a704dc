"""Whether labels can matter: do prompts in which the concept is inactive carry it all the same?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.labels.following import GRADED
from lenskit.selector import TokenSelection, select_tokens


def displacement_cosine(
    capture: Capture,
    activity: Float[Tensor, " prompt"],
    tokens: TokenSelection | None = None,
    *,
    graded: tuple[float, float] = GRADED,
) -> Float[Tensor, " layer"]:
    """Cosine of the displacements that the prefix causes in active and in inactive prompts.

    A displacement is the mean of ``resid_post`` over prompts with the prefix less that of those
    without, at the selected token (by default the attention-guided one). Prompts are active where
    ``activity`` (0 to 1: ``true_activity``, or a label that follows it) is at least the upper of
    ``graded``, inactive at or below the lower. Near 1 the two are alike, and labels can tell a
    learner nothing. NaN where all prompts are of one kind. Raises ValueError for another number of
    activities than prompts.

    >>> cosine = lk.displacement_cosine(capture, lk.true_activity(prompts))
    >>> len(cosine) == capture.layers
    True
    """
    rate = torch.as_tensor(activity)
    if rate.shape != (len(capture),):
        raise ValueError(
            f"activity must be one number for each of the {len(capture)} prompts, "
            f"got shape {list(rate.shape)}"
        )
    low, high = graded
    prefixed = capture.prompts.has_prefix
    rows = (select_tokens(capture) if tokens is None else tokens).take(capture.resid_post)
    bare = rows[~prefixed].mean(dim=0)
    kinds = (prefixed & (rate >= high), prefixed & (rate <= low))
    # The mean of no rows is NaN, and so is its cosine.
    active, inactive = (rows[kind].mean(dim=0) - bare for kind in kinds)
    return torch.cosine_similarity(active, inactive, dim=-1)
