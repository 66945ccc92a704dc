"""How well a label follows activity: as a classifier, and by rank."""

from __future__ import annotations

from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

# Rates of activity between these are neither inactive nor active.
GRADED = (0.1, 0.9)


def auroc(label: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"]) -> float:
    """How often a positive prompt's label lies above a negative's; NaN if there are none of one."""
    if bool(positive.all()) or not bool(positive.any()):
        return float("nan")
    return float(roc_auc_score(positive.numpy(), label.numpy()))


def rank_correlation(label: Float[Tensor, " prompt"], rate: Float[Tensor, " prompt"]) -> float:
    """Spearman correlation of a label with rates; NaN where either is constant."""
    if len(label) < 2 or bool((label == label[0]).all()) or bool((rate == rate[0]).all()):
        return float("nan")
    return float(spearmanr(label.numpy(), rate.numpy()).statistic)
