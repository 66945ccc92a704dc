"""Why did it say that? Activation patching, its gradient approximation, and causal vectors.

One prompt is run many times in one batch, each row with the activations of one site (a block and a
position, or a head) replaced by those of another prompt, by a mean or by noise. What that does to
the answer is what the site does for it.
"""

from __future__ import annotations

from lenskit.causal.attribution import attribute
from lenskit.causal.fitting import fit_vectors
from lenskit.causal.knockout import knock_out
from lenskit.causal.optimised import Optimised, optimise
from lenskit.causal.patching import patch, patch_pairs
from lenskit.causal.path import DecisionPath, decision_path
from lenskit.causal.prompts import Noised
from lenskit.causal.results import Agreement, Patching, agreement
from lenskit.causal.sources import Mean, Noise

__all__ = [
    "Agreement",
    "DecisionPath",
    "Mean",
    "Noise",
    "Noised",
    "Optimised",
    "Patching",
    "agreement",
    "attribute",
    "decision_path",
    "fit_vectors",
    "knock_out",
    "optimise",
    "patch",
    "patch_pairs",
]


def __dir__() -> list[str]:
    return __all__
