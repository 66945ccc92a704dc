"""Pictures of what the other modules return: each function makes one matplotlib ``Figure``.

``pyplot`` is never used, so no figure stays open and no setting leaks. Save a figure with
``figure.savefig(path)``, or with ``save_figure`` as SVG and PNG whose bytes depend on nothing but
the figure; a notebook with ``%matplotlib inline`` shows it.
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
from lenskit.figures.experiments import (
    DRAWINGS,
    Drawing,
    ablation_compared,
    blocks_by_number,
    causes_named,
    classes_compared,
    cost_frontier,
    depth_by_size,
    draw_experiment,
    labels_by_prompts,
    read_table,
    ways_compared,
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
from lenskit.figures.saving import save_figure
from lenskit.figures.sites import site_map
from lenskit.figures.studies import (
    blocks_compared,
    over_steering,
    row_names,
    steerability_bars,
    steerability_by_class,
)

__all__ = [
    "DRAWINGS",
    "Drawing",
    "Play",
    "ablation_compared",
    "activation_pca",
    "activity_correlation",
    "attention_map",
    "blocks_by_number",
    "blocks_compared",
    "by_block",
    "causes_named",
    "classes_compared",
    "cost_frontier",
    "depth_by_size",
    "draw_experiment",
    "enrichment_by_block",
    "head_map",
    "labels_by_prompts",
    "over_steering",
    "path_map",
    "pattern_rows",
    "play",
    "projection_histogram",
    "read_table",
    "row_names",
    "save_figure",
    "selected_token_map",
    "selected_token_shares",
    "site_map",
    "soft_label_curves",
    "steerability_bars",
    "steerability_by_class",
    "token_texts",
    "views",
    "ways_compared",
]


def __dir__() -> list[str]:
    return __all__
