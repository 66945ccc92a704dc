from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_rgba

from lenskit import figures
from lenskit.figures.style import BLUE


def test_a_site_map_has_blocks_from_below_and_full_colour_at_its_bound():
    values = torch.tensor([[0.0, -1.0, 0.5], [2.0, 0.0, 0.0]])
    names = ["$a$", "\n", "c"]
    figure = figures.site_map(values, ["0", "1"], names, label="effect", title="sites")
    axes, bar = figure.axes
    image = axes.images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-2, 2)
    assert image.cmap(image.norm(2.0)) == pytest.approx(to_rgba(BLUE))
    bottom, top = axes.get_ylim()
    assert bottom < top and [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["\\$a\\$", "\\n", "c"]
    assert bar.get_ylabel() == "effect" and figure._repr_png_()
    other = figures.site_map(values, ["0", "1"], names, label="effect", bound=5.0)
    assert other.axes[0].images[0].norm.vmax == 5


def test_names_must_fit_the_values():
    with pytest.raises(ValueError, match="values are 2 × 3"):
        figures.site_map(torch.zeros(2, 3), ["0"], ["a", "b", "c"], label="effect")
    assert figures.site_map(torch.zeros(1, 1), ["0"], ["a"], label="effect")._repr_png_()
