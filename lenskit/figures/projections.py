"""How far prompts lie along a concept vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lenskit.figures.captures import known_activity
from lenskit.figures.style import BLUE, GREY, ORANGE, legend, panel, plain, styled
from lenskit.selector import TokenSelection

if TYPE_CHECKING:
    from lenskit.capture import Capture
    from lenskit.vectors import ConceptVectors


@styled()
def projection_histogram(
    capture: Capture,
    tokens: TokenSelection,
    vectors: ConceptVectors,
    *,
    block: int,
    activity: Float[Tensor, " prompt"] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Projections of the prompts' residual streams on a block's vector, at the selected token.

    In mean residual norms of the block. Prompts with the prefix are split by whether the concept is
    active (true rate above one half) where that is known: ``activity``, by default the embedded
    grammar's. Raises ``ValueError`` for a block that is not there, and for vectors of another model
    or of every candidate token.
    """
    tokens.check(capture.candidates, capture.layers)
    if vectors.model != capture.model or vectors.directions.ndim != 2:
        raise ValueError(
            "vectors must be one for each block, learnt on the capture's model "
            f"({capture.model}); got {vectors.model}, of shape {list(vectors.directions.shape)}"
        )
    if not 0 <= block < capture.layers:
        raise ValueError(f"block must be from 0 to {capture.layers - 1}, got {block}")
    stream = tokens.take(capture.resid_post)[:, block].double()
    values = (stream @ vectors.directions[block].double()) / float(vectors.resid_norm[block])
    prefixed = capture.prompts.has_prefix
    truth = known_activity(capture.prompts) if activity is None else activity
    groups = {"without the prefix": (~prefixed, GREY)}
    if truth is None:
        groups["with the prefix"] = (prefixed, BLUE)
    else:
        groups["with it, inactive"] = (prefixed & (truth <= 0.5), ORANGE)
        groups["with it, active"] = (prefixed & (truth > 0.5), BLUE)
    names = [f"{group} (n = {int(rows.sum())})" for group, (rows, _) in groups.items()]
    name = plain(capture.prompts.concept.name)
    alt = f"Projections on the vector of {name} in block {block}: {', '.join(names)}"
    figure, axes = panel(ax, 7.6, 3.4, alt)
    edges = np.histogram_bin_edges(values.numpy(), bins=30)
    drawn = [
        axes.hist(values[rows].numpy(), edges, color=colour, alpha=0.6)[2]
        for rows, colour in groups.values()
    ]
    axes.set_xlabel("projection on the vector, mean residual norms")
    axes.set(ylabel="prompts", title=f"{name}, block {block}")
    legend(axes, ax is None, drawn, [each.replace(" (", "\n(") for each in names])
    return figure
