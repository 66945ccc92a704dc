"""How well a label follows activity: as a classifier, and by rank."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata, spearmanr
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


def aurocs(
    values: Float[Tensor, "prompt *site"], positive: Bool[Tensor, " prompt"]
) -> Float[Tensor, "*site"]:
    """``auroc`` of every site at once, by the ranks of the positive prompts."""
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not (ones and zeros):
        return torch.full(values.shape[1:], float("nan"), dtype=torch.float64)
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    return (ranks[positive].sum(dim=0) - ones * (ones + 1) / 2) / (ones * zeros)


def rank_correlations(
    values: Float[Tensor, "prompt *site"], rate: Float[Tensor, " prompt"]
) -> Float[Tensor, "*site"]:
    """``rank_correlation`` of every site at once."""
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0)).flatten(1)
    own = torch.from_numpy(np.asarray(rankdata(rate.numpy())))
    ranks, own = ranks - ranks.mean(dim=0), own - own.mean()
    # Where either is constant this is 0 / 0.
    found = own @ ranks / (own.norm() * ranks.norm(dim=0))
    return found.view(values.shape[1:])
