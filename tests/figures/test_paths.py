"""The drawing of a decision path: every edge once, no wire on another one, text as it is."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from lenskit.figures import path_map
from lenskit.figures.style import BLUE, ORANGE

READS = {(0, 3, 1): -1.0, (1, 3, 1): 0.5, (0, 7, 2): -0.25, (1, 5, 0): 0.004}
WRITES = {(3, 1): -2.0, (7, 2): 0.1, (5, 0): -0.5}
MLPS = {3: -11.0, 6: 0.3}
OPTIONS = {
    "spans": ["Answer in $one$ word.", "a long one " * 30],
    "answer": " yes\n",
    "blocks": range(32),
    "label": "log-probability of ' yes'",
}


def wires(figure):
    return [patch for patch in figure.axes[0].patches if not patch.get_fill()]


def test_every_edge_is_drawn_once_in_the_colour_of_its_sign_as_wide_as_its_effect():
    figure = path_map(READS, WRITES, MLPS, **OPTIONS)
    drawn, effects = wires(figure), [*READS.values()]
    assert len(drawn) == len(READS) + len(WRITES) + len(MLPS)
    for wire, effect in zip(drawn, effects, strict=False):
        colour = BLUE if effect <= 0 else ORANGE
        assert wire.get_edgecolor()[:3] == pytest.approx(
            [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        )
    widths = {effect: wire.get_linewidth() for wire, effect in zip(drawn, effects, strict=False)}
    assert widths[-1.0] > widths[0.5] > widths[-0.25] > widths[0.004]
    # The greatest of the heads, and an MLP beyond it.
    assert max(wire.get_linewidth() for wire in drawn) == pytest.approx(5.5)


def test_wires_lie_at_heights_of_their_own_and_nodes_at_their_blocks():
    figure = path_map(READS, WRITES, MLPS, **OPTIONS)
    heights = [round(float(wire.get_path().vertices[-1][1]), 6) for wire in wires(figure)]
    of_reads = heights[: len(READS)]
    assert len({*of_reads}) == len(READS)
    assert len({*heights[len(READS) :]}) == len(WRITES) + len(MLPS)
    nodes = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert nodes["3.1"][0] == nodes["MLP 3"][0] < nodes["5.0"][0] < nodes["7.2"][0]
    assert nodes["3.1"][1] < nodes["5.0"][1] < nodes["7.2"][1]


def test_texts_are_shown_as_they_are_and_long_ones_shortened():
    figure = path_map(READS, WRITES, MLPS, notes=["-1.0 in all", ""], **OPTIONS)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "Answer in \\$one\\$ word.\n-1.0 in all" in texts
    (long,) = [text for text in texts if text.startswith("a long one")]
    assert long.endswith("…") and len(long.splitlines()) == 3
    assert any("yes" in text for text in texts) and "\N{MINUS SIGN}11.00" in texts
    assert "+0.0040" in texts and "4 edges from 2 spans to 3 heads" in figure.alt
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    "reads, writes, mlps", [({}, WRITES, {}), ({}, {}, MLPS), (READS, WRITES, {})]
)
def test_parts_alone_can_be_drawn_and_on_axes_of_ones_own(reads, writes, mlps):
    own = Figure()
    axes = own.subplots()
    assert path_map(reads, writes, mlps, ax=axes, **OPTIONS) is own
    assert len(wires(own)) == len(reads) + len(writes) + len(mlps)
    one = path_map(reads, writes, mlps, **(OPTIONS | {"blocks": [3, 5, 6, 7]}))
    one.draw_without_rendering()


def test_edges_without_their_ends_are_refused():
    with pytest.raises(ValueError, match="no edge to draw"):
        path_map({}, {}, {}, **OPTIONS)
    with pytest.raises(ValueError, match="go to no head of writes"):
        path_map(READS, {(3, 1): 1.0}, {}, **OPTIONS)
    with pytest.raises(ValueError, match="come from no span"):
        path_map({(2, 3, 1): 1.0}, WRITES, {}, **OPTIONS)
    with pytest.raises(ValueError, match="blocks lack"):
        path_map(READS, WRITES, MLPS, **(OPTIONS | {"blocks": [3, 5]}))
