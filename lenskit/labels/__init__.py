"""How active the concept is in each prompt, at each block: labels for the vectors."""

from __future__ import annotations

from lenskit.labels.activity import activity_labels, true_activity
from lenskit.labels.attention import hard_labels, soft_labels
from lenskit.labels.displacement import displacement_cosine
from lenskit.labels.following import GRADED, auroc, rank_correlation
from lenskit.labels.gating import GatingHead, gating_head, gating_labels, two_groups_p_value
from lenskit.labels.named import LABELS, find_labels

__all__ = [
    "GRADED",
    "LABELS",
    "GatingHead",
    "activity_labels",
    "auroc",
    "displacement_cosine",
    "find_labels",
    "gating_head",
    "gating_labels",
    "hard_labels",
    "rank_correlation",
    "soft_labels",
    "true_activity",
    "two_groups_p_value",
]


def __dir__() -> list[str]:
    return __all__
