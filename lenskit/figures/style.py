"""What all pictures share: colours, fonts, and labels that stand beside what they name."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the common kinds of colour blindness can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, INK = "#CC79A7", "#56B4E9", "#F0E442", "#262626"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK, YELLOW)
GREY, PALE = "#8C8C8C", "#D4D4D4"
MARKERS = "osD^vPXd"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "image.cmap": "cividis",
}


def styled() -> Any:
    """The style while a picture is made; a context or a decorator."""
    return rc_context(STYLE)


class Picture(Figure):
    """A figure that a notebook shows by itself, without pyplot.

    ``alt``: what it shows, for those who cannot see it; a notebook keeps it beside the image.
    """

    alt = ""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
        return buffer.getvalue()

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        image = b64encode(self._repr_png_()).decode("ascii")
        shown = {"image/png": image, "text/plain": self.alt or repr(self)}
        return shown, {"image/png": {"alt": self.alt}}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Picture, list[Axes]]:
    """A figure of so many inches, known to no window system, and its axes row by row."""
    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def panel(ax: Axes | None, width: float, height: float, alt: str) -> tuple[Figure, Axes]:
    """The axes to draw on: those given, or the only ones of a new figure that ``alt`` describes."""
    if ax is not None:
        return ax.get_figure(root=True), ax
    figure, (axes,) = new_figure(width, height)
    figure.alt = alt
    return figure, axes


def legend(
    axes: Axes, own: bool, keys: Sequence[Any], names: Sequence[str], **options: Any
) -> None:
    """A legend beside the axes, in a figure of its own at the upper right."""
    look = {"fontsize": 9, "alignment": "left"} | options
    if own:
        axes.get_figure(root=True).legend(keys, names, loc="outside right upper", **look)
    else:
        axes.legend(keys, names, loc="upper left", bbox_to_anchor=(1.01, 1), **look)


def plain(text: str) -> str:
    """Text of a model or a user, shown as it is: no mathematics, line ends visible."""
    return text.replace("\n", "\\n").replace("$", "\\$")


def end_labels(axes: Axes, ends: Mapping[str, tuple[float, Any]], size: float = 9) -> None:
    """Name lines at their right ends, ``{name: (height, colour)}``, moved apart where needed."""
    axes.figure.draw_without_rendering()  # the limits are not final before
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    order = sorted(ends, key=lambda name: ends[name][0])
    gap = 1.25 * size * (high - low) / height
    places = apart([float(ends[name][0]) for name in order], gap, low, high)
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            plain(name),
            (1, place),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=ends[name][1],
            fontsize=size,
            annotation_clip=False,
        )


def apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Increasing values, moved as little as needed to lie ``gap`` apart and above ``low``."""
    places = list(values)
    for i, value in enumerate(places):
        places[i] = max(value, places[i - 1] + gap if i else low)
    ceiling = max(high, low + gap * (len(places) - 1))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return places


def token_colours(number: int) -> list[Any]:
    """A colour for each candidate token, in text order."""
    from matplotlib import colormaps

    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [colormaps["cividis"](place) for place in np.linspace(0, 1, number)]
