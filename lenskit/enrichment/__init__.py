"""How enriched each block is for a concept, by permutation tests (AGS, section 4)."""

from __future__ import annotations

from lenskit.enrichment.permutation import Null
from lenskit.enrichment.scores import Enrichment, enrich, rank_stability

__all__ = [
    "Null",
    "Enrichment",
    "enrich",
    "rank_stability",
]


def __dir__() -> list[str]:
    return __all__
