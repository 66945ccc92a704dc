"""How active the concept is in each prompt, at each block: labels for the vectors."""

from __future__ import annotations

from lenskit.labels.activity import Activity, activity_labels, true_activity
from lenskit.labels.attention import hard_labels, soft_labels
from lenskit.labels.displacement import displacement_cosine
from lenskit.labels.divergence import divergence_labels, next_token_divergence
from lenskit.labels.following import (
    GRADED,
    auroc,
    aurocs,
    rank_correlation,
    rank_correlations,
)
from lenskit.labels.gating import (
    GatingHead,
    explained_by_two_groups,
    gating_head,
    gating_labels,
    gating_or_hard_labels,
    two_groups_p_value,
)
from lenskit.labels.named import LABELS, find_labels

__all__ = [
    "GRADED",
    "LABELS",
    "Activity",
    "GatingHead",
    "activity_labels",
    "auroc",
    "aurocs",
    "displacement_cosine",
    "divergence_labels",
    "explained_by_two_groups",
    "find_labels",
    "gating_head",
    "gating_labels",
    "gating_or_hard_labels",
    "hard_labels",
    "next_token_divergence",
    "rank_correlation",
    "rank_correlations",
    "soft_labels",
    "true_activity",
    "two_groups_p_value",
]


def __dir__() -> list[str]:
    return __all__
