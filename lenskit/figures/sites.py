"""A number for each block and each token or head, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from lenskit.figures.style import BLUE, RED, panel, plain, styled

_SIGNED = LinearSegmentedColormap.from_list("signed", [RED, "white", BLUE])


@styled()
def site_map(
    values: Float[Tensor, "block place"],
    blocks: Sequence[str],
    places: Sequence[str],
    *,
    label: str,
    place: str = "token",
    title: str = "",
    bound: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Signed values, white at 0: blocks from below upwards, tokens or heads from left to right.

    ``label`` names the values and ``place`` the columns. ``bound``: the value of the full colours,
    by default the greatest there is; give one to several maps that are to be compared.
    Raises ``ValueError`` for names of another number.
    """
    rows, columns = values.shape
    if (len(blocks), len(places)) != (rows, columns):
        raise ValueError(
            f"there are names for {len(blocks)} blocks and {len(places)} places, but values are "
            f"{rows} × {columns}"
        )
    most = float(values.abs().max()) if bound is None else bound
    name = "\n".join(wrap(plain(label), max(30, 8 * rows)))
    alt = f"{label}, by block ({rows}) and {place} ({columns}); from -{most:.3g} to {most:.3g}"
    size = max(4.2, 2.6 + 0.2 * columns), max(2.8, 1.7 + 0.19 * rows)
    figure, axes = panel(ax, *size, alt)
    image = axes.imshow(
        values.float().numpy(), aspect="auto", cmap=_SIGNED, vmin=-most or -1, vmax=most or 1
    )
    axes.invert_yaxis()
    axes.set_yticks(range(rows), list(map(plain, blocks)), fontsize=8)
    axes.set_xticks(range(columns), list(map(plain, places)), fontsize=7.5, rotation=90)
    axes.tick_params(length=0)
    axes.set(xlabel=place, ylabel="block", title=plain(title))
    figure.colorbar(image, ax=axes, pad=0.01).set_label(name, fontsize=8.5)
    return figure
