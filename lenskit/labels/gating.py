"""Labels from the one head that gates: found without labels, by how much its attention varies.

The mean over heads hides heads that read the prefix only where the concept is active. Such a head
gives a better label than Eq. 4, where there is one; a test of its attention says whether there is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.labels.attention import hard_labels
from lenskit.selector import TokenSelection

LEVEL = 0.05


@dataclass(frozen=True)
class GatingHead:
    """The head, at one candidate token, whose attention to the prefix varies most.

    ``attention``: its mass on the prefix for each prompt, 0 without a prefix. ``p_value``: of «it
    does not fall into two groups over the prompts with a prefix»; where that is not small no head
    gates, and the label tells nothing.
    """

    block: int
    head: int
    candidate: int
    attention: Float[Tensor, " prompt"]
    p_value: float

    @property
    def gates(self) -> bool:
        """Whether its attention falls into two groups, at the level of 5 %."""
        return self.p_value < LEVEL

    @property
    def label(self) -> Float[Tensor, " prompt"]:
        """The attention, min-max scaled over all prompts."""
        low, high = self.attention.min(), self.attention.max()
        return (self.attention - low) / (high - low)


def gating_head(capture: Capture, *, draws: int = 1000, seed: int = 0) -> GatingHead:
    """The (block, head, candidate) whose attention to the prefix has the largest standard
    deviation over the prompts with a prefix, and a test of whether it falls into two groups.

    ``draws`` and ``seed`` are those of ``two_groups_p_value``. Raises ValueError where no attention
    varies.

    >>> found = lk.gating_head(capture)
    >>> 0 < found.p_value <= 1
    True
    """
    prefixed = capture.prompts.has_prefix
    spread = capture.attention_to_prefix[prefixed].std(dim=0).nan_to_num(nan=0.0)
    if not float(spread.max()) > 0:
        raise ValueError("no head's attention to the prefix varies over the prompts with a prefix")
    block, head, candidate = (int(i) for i in torch.unravel_index(spread.argmax(), spread.shape))
    attention = capture.attention_to_prefix[:, block, head, candidate] * prefixed
    p_value = two_groups_p_value(attention[prefixed], draws=draws, seed=seed)
    return GatingHead(block, head, candidate, attention, p_value)


def gating_labels(
    capture: Capture, tokens: TokenSelection | None = None
) -> Float[Tensor, "prompt layer"]:
    """The attention of ``gating_head`` to the prefix, scaled to [0, 1]: one label for all blocks.

    No truth is used, and ``tokens`` neither, but it must fit. Warns where that head's attention
    does not fall into two groups: then nothing is found. Raises ValueError as ``gating_head``.

    >>> labels = lk.gating_labels(capture)
    >>> float(labels.min()), float(labels.max())
    (0.0, 1.0)
    """
    if tokens is not None:
        tokens.check(capture.candidates, capture.layers)
    found = gating_head(capture)
    if not found.gates:
        warnings.warn(
            f"the attention that varies most (block {found.block}, head {found.head}) does not "
            f"fall into two groups (p = {found.p_value:.2f}): no head gates "
            f"{capture.prompts.concept.name!r}, and these labels need not follow activity",
            stacklevel=2,
        )
    return found.label[:, None].expand(-1, capture.layers).clone()


def gating_or_hard_labels(
    capture: Capture, tokens: TokenSelection | None = None
) -> Float[Tensor, "prompt layer"]:
    """``gating_labels`` where that head's attention falls into two groups, else hard labels.

    So that labels follow activity where attention tells it, and claim nothing where it does not.

    >>> labels = lk.gating_or_hard_labels(capture)
    >>> labels.shape == (len(capture), capture.layers)
    True
    """
    hard = hard_labels(capture, tokens)
    try:
        found = gating_head(capture)
    except ValueError:
        return hard  # no attention varies
    return found.label[:, None].expand_as(hard).clone() if found.gates else hard


def two_groups_p_value(
    values: Float[Tensor, " value"], *, draws: int = 1000, seed: int = 0
) -> float:
    """The p-value of «the values do not fall into two groups» (after Engelman and Hartigan, 1969).

    The statistic is the share of the variance that the best split into a lower and an upper group
    explains, each of a tenth of the values or more; it is compared with ``draws`` samples from a
    uniform distribution, where it is 3/4 (normal: 0.64). 1 for fewer than four values, or equal
    ones.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 4 or np.ptp(x) == 0:
        return 1.0
    null = np.random.default_rng(seed).random((draws, len(x)))
    reached = explained_by_two_groups(null) >= explained_by_two_groups(x[None])
    return float((reached.sum() + 1) / (draws + 1))


def explained_by_two_groups(x: Float[np.ndarray, "sample value"]) -> Float[np.ndarray, " sample"]:
    """The largest share of each sample's variance that lies between two groups."""
    number = x.shape[1]
    ordered = np.sort(x - x.mean(1, keepdims=True), axis=1)
    fewest = max(1, number // 10)
    size = np.arange(fewest, number - fewest + 1)
    lower = ordered.cumsum(1)[:, size - 1]
    # Of centred values the groups' sums cancel, so that one sum gives what lies between them.
    between = lower**2 * number / (size * (number - size))
    return between.max(1) / (ordered**2).sum(1)
