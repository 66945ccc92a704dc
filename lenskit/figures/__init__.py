"""Pictures of what the other modules return: each function makes one matplotlib ``Figure``.

``pyplot`` is never used, so no figure stays open and no setting leaks. Save a figure with
``figure.savefig(path)``; a notebook with ``%matplotlib inline`` shows it.
"""

from __future__ import annotations

from lenskit.figures import views
from lenskit.figures.blocks import by_block
from lenskit.figures.captures import (
    activation_pca,
    attention_map,
    enrichment_by_block,
    selected_token_map,
    selected_token_shares,
    soft_label_curves,
)
from lenskit.figures.heads import head_map
from lenskit.figures.inspection import (
    activity_correlation,
    pattern_rows,
    token_texts,
)
from lenskit.figures.paths import path_map
from lenskit.figures.play import Play, play
from lenskit.figures.projections import projection_histogram
from lenskit.figures.sites import site_map
from lenskit.figures.studies import (
    blocks_compared,
    over_steering,
    row_names,
    steerability_bars,
    steerability_by_class,
)

__all__ = [
    "activation_pca",
    "activity_correlation",
    "attention_map",
    "Play",
    "play",
    "blocks_compared",
    "by_block",
    "enrichment_by_block",
    "head_map",
    "over_steering",
    "path_map",
    "pattern_rows",
    "projection_histogram",
    "row_names",
    "selected_token_map",
    "selected_token_shares",
    "site_map",
    "soft_label_curves",
    "steerability_bars",
    "steerability_by_class",
    "token_texts",
    "views",
]


def __dir__() -> list[str]:
    return __all__
