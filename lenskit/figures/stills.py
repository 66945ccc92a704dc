"""Still pictures that stand for interactive views where scripts do not run."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lenskit.figures.style import BLUE, INK, PALE, RED, new_figure, plain, styled

COLUMNS = 92  # characters of a line of text


@styled()
def tokens_still(
    tokens: Sequence[str], values: Sequence[float], bound: float, title: str, signed: bool
) -> bytes:
    """The tokens as running text in coloured boxes, as a PNG."""
    colours = _colours(signed)
    scale = Normalize(-bound if signed else 0, bound, clip=True)
    places, column, line = [], 0, 0
    for token in tokens:
        wide = min(len(token) or 1, COLUMNS)
        if column + wide > COLUMNS:
            column, line = 0, line + 1
        places.append((column, line, wide))
        column += wide
        if token.endswith("↵"):
            column, line = 0, line + 1
    lines = places[-1][1] + 1
    figure = Figure(figsize=(7.4, 0.34 + 0.21 * lines))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.6, COLUMNS + 0.6), ylim=(lines + 0.2, -1.4))
    axes.set_axis_off()
    axes.text(0, -0.75, plain(title), fontsize=9, va="center")
    for token, value, (x, y, wide) in zip(tokens, values, places, strict=True):
        face = colours(scale(value))
        box = Rectangle((x, y - 0.42), wide, 0.84, facecolor=face, edgecolor=PALE, linewidth=0.5)
        axes.add_patch(box)
        look = {"family": "DejaVu Sans Mono", "fontsize": 9.2, "color": _ink(face)}
        axes.text(x, y, plain(token[:COLUMNS]), va="center_baseline", **look)
    return _png(figure)


@styled()
def attention_still(
    tokens: Sequence[str],
    queries: Sequence[str],
    attention: Float[np.ndarray, "query key"],
    bound: float,
    title: str,
) -> bytes:
    """Rows of attention with the tokens they look at beneath, as a PNG."""
    figure, (axes,) = new_figure(max(4.0, 1.6 + 0.145 * len(tokens)), 1.7 + 0.16 * len(queries))
    image = axes.imshow(attention, aspect="auto", cmap=_colours(False), vmin=0, vmax=bound)
    axes.set_yticks(range(len(queries)), list(map(plain, queries)), fontsize=7)
    axes.set_xticks(range(len(tokens)), list(map(plain, tokens)), fontsize=6.5, rotation=90)
    axes.tick_params(length=0)
    axes.set_title(plain(title), fontsize=8)
    figure.colorbar(image, ax=axes, aspect=8, pad=0.01).ax.tick_params(labelsize=6.5)
    return _png(figure)


def _colours(signed: bool) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(
        "", [RED, "white", BLUE] if signed else ["white", BLUE]
    )


def _ink(face: tuple[float, ...]) -> str:
    return "white" if sum(face[:3]) < 1.5 else INK


def _png(figure: Figure) -> bytes:
    buffer, small = BytesIO(), BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    # A few colours are enough, at a third of the bytes.
    Image.open(buffer).convert("RGB").quantize(96).save(small, "PNG", optimize=True)
    return small.getvalue()
