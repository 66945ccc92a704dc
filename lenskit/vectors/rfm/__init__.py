"""The Recursive Feature Machine, from the outside in.

Read ``machine`` first: the learner, one page. ``grid`` tries its settings on many blocks and
chooses; ``recursion`` is the mathematics of one setting, on n x n matrices; ``spectral`` is the
linear algebra beneath it.
"""

from __future__ import annotations

from lenskit.vectors.rfm.grid import BlockFits, each_block, fit_blocks
from lenskit.vectors.rfm.machine import RecursiveFeatureMachine

__all__ = ["BlockFits", "RecursiveFeatureMachine", "each_block", "fit_blocks"]


def __dir__() -> list[str]:
    return __all__
