"""Pictures of the experiments: plain functions from a saved table to a figure."""

from __future__ import annotations

from lenskit.figures.experiments.ablation import ablation_compared
from lenskit.figures.experiments.blocks import blocks_by_number, depth_by_size
from lenskit.figures.experiments.classes import causes_named, classes_compared
from lenskit.figures.experiments.labels import cost_frontier, labels_by_prompts
from lenskit.figures.experiments.pictures import DRAWINGS, Drawing, draw_experiment
from lenskit.figures.experiments.tables import read_table
from lenskit.figures.experiments.ways import ways_compared

__all__ = [
    "DRAWINGS",
    "Drawing",
    "ablation_compared",
    "blocks_by_number",
    "causes_named",
    "classes_compared",
    "cost_frontier",
    "depth_by_size",
    "draw_experiment",
    "labels_by_prompts",
    "read_table",
    "ways_compared",
]
