"""Scores of attention heads as heat maps, one panel for each task."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from lenskit.figures.style import BLUE, INK, ORANGE, PALE, new_figure, plain, styled

# Blue is dark and orange light, so that both signs can be told apart in print without colours too.
_ABOUT = LinearSegmentedColormap.from_list("about", [ORANGE, "white", BLUE]).with_extremes(bad=PALE)


@styled()
def head_map(
    values: Float[Tensor, "task block head"],
    tasks: Sequence[str],
    baselines: Sequence[float] | None = None,
    *,
    label: str = "score less that without steering",
    marked: Sequence[Collection[tuple[int, int]]] | None = None,
    bound: float | None = None,
    title: str = "",
) -> Figure:
    """Each head's score, white at the task's baseline; blocks from below, heads from the left.

    All panels share one scale, up to ``bound`` (by default the greatest difference there is). Blue
    is above the baseline; orange is below it, and beyond a third of the scale also has a minus.
    NaN, for heads that were not scored, is grey. ``marked``: for each task the heads that get a
    dot, such as its top ten. Raises ValueError for names, baselines or marks of another number.
    """
    number, blocks, heads = values.shape
    for name, given in (("tasks", tasks), ("baselines", baselines), ("marked", marked)):
        if given is not None and len(given) != number:
            raise ValueError(f"{name}: values are of {number} tasks, got {len(given)}")
    about = np.zeros(number) if baselines is None else np.asarray(baselines, dtype=float)
    shown = values.double().cpu().numpy() - about[:, None, None]
    known = np.abs(shown[np.isfinite(shown)])
    most = bound or float(known.max(initial=0)) or 1.0
    columns = 2 if number == 4 else min(number, 3)
    rows = math.ceil(number / columns)
    width, height = max(2.4, 1.1 + 0.16 * heads), max(2.0, 1.1 + 0.14 * blocks)
    figure, panels = new_figure(
        0.9 + columns * width, 0.4 * bool(title) + rows * height, rows, columns
    )
    for axes in panels[number:]:
        axes.set_axis_off()
    for i, axes in enumerate(panels[:number]):
        image = axes.imshow(
            np.ma.masked_invalid(shown[i]), aspect="auto", cmap=_ABOUT, vmin=-most, vmax=most
        )
        axes.invert_yaxis()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        base = "" if baselines is None else f" (without: {about[i]:.2f})"
        axes.set_title(plain(tasks[i]) + base, fontsize=9)
        below = np.argwhere(shown[i] < -most / 3)
        look = {"color": INK, "linestyle": "none"}
        axes.plot(below[:, 1], below[:, 0], marker="_", markersize=3.5, **look)
        if marked is not None and len(marked[i]):
            places = np.array(sorted(marked[i]))
            axes.plot(
                places[:, 1], places[:, 0], marker="o", markersize=3.2, mfc="white", mew=0.8, **look
            )
        if i % columns == 0:
            axes.set_ylabel("block")
        if i + columns >= number:
            axes.set_xlabel("head")
    figure.colorbar(image, ax=panels, pad=0.01).set_label(plain(label), fontsize=8.5)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = (
        f"{label}, by block ({blocks}) and head ({heads}) for {', '.join(tasks)}; from "
        f"-{most:.3g} to {most:.3g}"
    )
    return figure
