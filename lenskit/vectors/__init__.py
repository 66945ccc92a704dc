"""Concept vectors: a direction in the residual stream for each block (AGS, section 3).

Learners are scikit-learn estimators of their own; ``fit_vectors`` runs one on every block.
"""

from __future__ import annotations

from lenskit.vectors.addends import Vectors, added, parts
from lenskit.vectors.arithmetic import Combination, closing_of
from lenskit.vectors.blocks import in_blocks, increments
from lenskit.vectors.fitting import fit_vectors
from lenskit.vectors.learner import Learner, split
from lenskit.vectors.learners import LEARNERS, find_learner, learners_of
from lenskit.vectors.logistic import Logistic
from lenskit.vectors.mean_difference import MeanDifference, SoftCovariance
from lenskit.vectors.pca import PrincipalComponent
from lenskit.vectors.rfm import BlockFits, RecursiveFeatureMachine, fit_blocks
from lenskit.vectors.ridge import Ridge
from lenskit.vectors.storage import ConceptVectors, check_file, checksum, read_safetensors

__all__ = [
    "LEARNERS",
    "BlockFits",
    "Combination",
    "ConceptVectors",
    "Learner",
    "Logistic",
    "MeanDifference",
    "PrincipalComponent",
    "RecursiveFeatureMachine",
    "Ridge",
    "SoftCovariance",
    "Vectors",
    "added",
    "check_file",
    "checksum",
    "closing_of",
    "fit_blocks",
    "find_learner",
    "fit_vectors",
    "in_blocks",
    "increments",
    "learners_of",
    "parts",
    "read_safetensors",
    "split",
]


def __dir__() -> list[str]:
    return __all__
