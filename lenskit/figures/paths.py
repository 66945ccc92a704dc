"""The way of an answer as a drawing: spans, the heads that read them, MLPs, the answer's token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from lenskit.figures.style import BLUE, GREY, INK, ORANGE, PALE, apart, panel, plain, styled

# From left to right: spans end, wires are straight, the blocks, wires bend again, the answer.
_SPANS, _STRAIGHT, _FIRST, _FINAL, _BENT, _ANSWER = 0.0, 0.15, 0.31, 0.72, 0.88, 1.04
_LEFT, _RIGHT = -0.36, 1.2
_THIN, _WIDE = 0.8, 5.5
_CHARACTERS, _LINES = 26, 3


@dataclass(frozen=True)
class _Node:
    """A head or an MLP (``head`` is None), the height of its wire to the answer, and its effect."""

    block: int
    head: int | None
    height: float
    effect: float


@styled()
def path_map(
    reads: Mapping[tuple[int, int, int], float],
    writes: Mapping[tuple[int, int], float],
    mlps: Mapping[int, float],
    *,
    spans: Sequence[str],
    answer: str,
    blocks: Sequence[int],
    label: str,
    notes: Sequence[str] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Measured edges as wires: from spans on the left over heads at their blocks to the answer.

    ``reads``: the effect of cutting a head's attention to a span, by (span, block, head);
    ``writes``: of replacing a head's output, by (block, head); ``mlps``: of replacing an MLP's, by
    block. ``label`` names what the effects are of. Blue wires support the answer (cutting them
    lowers it), broken orange ones oppose it. Widths are on one scale, up to the greatest edge of a
    head; an MLP's, often far greater, are no wider. ``notes``: more below each span.

    Raises ``ValueError`` where there is no edge, and for edges whose span, head or block is not
    there.
    """
    if not writes and not mlps:
        raise ValueError("there is no edge to draw")
    if lost := [key for key in reads if key[1:] not in writes or not 0 <= key[0] < len(spans)]:
        raise ValueError(f"edges {lost[:3]} of reads come from no span, or go to no head of writes")
    if absent := ({block for block, _ in writes} | set(mlps)) - set(blocks):
        raise ValueError(f"blocks lack {sorted(absent)}, at which there are edges")
    lanes, nodes = _rows(reads, writes, mlps)
    texts = _texts(spans, notes or [""] * len(spans))
    bottom = max([0.0, *lanes.values(), *(node.height for node in nodes)])
    starts = _beside(lanes, texts, bottom)
    low, high = max([bottom, *starts]) + 1.0, min([0.0, *starts]) - 1.2
    alt = (
        f"{len(reads)} edges from {len(spans)} spans to {len(writes)} heads, and from these and "
        f"{len(mlps)} MLPs to the answer {answer!r}, with the change of {label} when each is cut"
    )
    figure, axes = panel(ax, 9.0, 1.3 + 0.24 * (low - high), alt)
    axes.set(xlim=(_LEFT, _RIGHT), ylim=(low, high), yticks=[], title=plain(title))
    axes.spines[:].set_visible(False)
    column = _columns(axes, blocks, low, high)

    scaled = [*reads.values(), *writes.values()] or [*mlps.values()]
    most = max(map(abs, scaled)) or 1.0
    middle = sum(node.height for node in nodes) / len(nodes)
    for (span, block, head), effect in reads.items():
        y = lanes[span, block, head]
        _wire(axes, (_SPANS, starts[span]), (_STRAIGHT, y), column[block], effect, most)
        _number(axes, _STRAIGHT, y, effect)
    for node in nodes:
        x = column[node.block]
        own = [y for key, y in lanes.items() if key[1:] == (node.block, node.head)]
        if own:
            axes.vlines(x, min(own), max(own), color=INK, lw=2, zorder=3)
        _wire(axes, (_ANSWER, middle), (_BENT, node.height), x, node.effect, most)
        _number(axes, _BENT, node.height, node.effect)
        name = f"MLP {node.block}" if node.head is None else f"{node.block}.{node.head}"
        _box(axes, x, node.height, name, "square" if node.head is None else "round", INK)
    for y, text in zip(starts, texts, strict=True):
        _box(axes, _SPANS, y, text, "round", GREY, align="right")
    _box(axes, _ANSWER, middle, plain(repr(answer)), "round", INK, align="left", size=10)
    _explain(axes, label, high)
    return figure


def _rows(
    reads: Mapping[tuple[int, int, int], float],
    writes: Mapping[tuple[int, int], float],
    mlps: Mapping[int, float],
) -> tuple[dict[tuple[int, int, int], float], list[_Node]]:
    """A height for every wire: blocks from above, so that no two lie on each other."""
    lanes: dict[tuple[int, int, int], float] = {}
    nodes: list[_Node] = []
    height = 0.0
    for block in sorted({block for block, _ in writes} | set(mlps)):
        for own, head in sorted(pair for pair in writes if pair[0] == block):
            keys = sorted(key for key in reads if key[1:] == (own, head))
            lanes |= {key: height + i for i, key in enumerate(keys)}
            here = height + max(0, len(keys) - 1) / 2
            nodes.append(_Node(block, head, here, writes[own, head]))
            height += max(1, len(keys)) + 0.4
        if block in mlps:
            nodes.append(_Node(block, None, height, mlps[block]))
            height += 1.4
    return lanes, nodes


def _texts(spans: Sequence[str], notes: Sequence[str]) -> list[str]:
    """What stands in the boxes of the spans: a few lines each."""
    found = []
    for span, note in zip(spans, notes, strict=True):
        lines = wrap(plain(span.strip()), _CHARACTERS) or ["(blank)"]
        if len(lines) > _LINES:
            lines = [*lines[: _LINES - 1], lines[_LINES - 1][: _CHARACTERS - 1] + "…"]
        found.append("\n".join([*lines, *plain(note).split("\\n")] if note else lines))
    return found


def _beside(
    lanes: Mapping[tuple[int, int, int], float], texts: Sequence[str], bottom: float
) -> list[float]:
    """The height of each span: as near to its wires as the boxes allow."""
    gap = 0.75 * max(text.count("\n") + 1 for text in texts) + 0.9
    wanted = []
    for span in range(len(texts)):
        own = [y for key, y in lanes.items() if key[0] == span]
        wanted.append(sum(own) / len(own) if own else bottom)
    order = sorted(range(len(texts)), key=lambda span: wanted[span])
    placed = apart([wanted[span] for span in order], gap, 0.0, bottom)
    return [placed[order.index(span)] for span in range(len(texts))]


def _columns(axes: Axes, blocks: Sequence[int], low: float, high: float) -> dict[int, float]:
    """The place of each block from left to right, with its line and its number."""
    ordered = sorted(blocks)
    centre = (_FIRST + _FINAL) / 2
    step = (_FINAL - _FIRST) / max(1, len(ordered) - 1)
    left = _FIRST if len(ordered) > 1 else centre
    column = {block: left + step * place for place, block in enumerate(ordered)}
    axes.vlines([*column.values()], high + 0.6, low, color=PALE, lw=0.6, zorder=0)
    every = -(-len(ordered) // 12)
    shown = ordered[::every]
    axes.set_xticks([column[block] for block in shown], list(map(str, shown)), fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("block", x=(centre - _LEFT) / (_RIGHT - _LEFT), fontsize=9)
    return column


def _wire(
    axes: Axes,
    end: tuple[float, float],
    bend: tuple[float, float],
    straight: float,
    effect: float,
    most: float,
) -> None:
    """A curve from ``end`` to ``bend``, and on at that height to the place ``straight``."""
    half = (end[0] + bend[0]) / 2
    curve = Path(
        [end, (half, end[1]), (half, bend[1]), bend, (straight, bend[1])],
        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO],
    )
    axes.add_patch(
        PathPatch(
            curve,
            fill=False,
            lw=_THIN + (_WIDE - _THIN) * min(1.0, abs(effect) / most),
            ls="-" if effect <= 0 else (0, (3, 1.2)),
            color=BLUE if effect <= 0 else ORANGE,
            capstyle="butt",
            alpha=0.85,
            zorder=2,
        )
    )


def _number(axes: Axes, x: float, y: float, effect: float) -> None:
    told = f"{effect:+#.2g}" if abs(effect) < 0.1 else f"{effect:+.2f}"
    axes.text(
        x,
        y,
        told.replace("-", "\N{MINUS SIGN}"),
        ha="center",
        va="center",
        fontsize=7.5,
        bbox={"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none"},
        zorder=3,
    )


def _box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    style: str,
    edge: str,
    *,
    align: str = "center",
    size: float = 8,
) -> None:
    look = {"boxstyle": f"{style},pad=0.3", "fc": "white", "ec": edge, "lw": 0.8}
    axes.text(x, y, text, ha=align, va="center", fontsize=size, bbox=look, zorder=4)


def _explain(axes: Axes, label: str, high: float) -> None:
    """What the columns of numbers are, and the two kinds of wires."""
    for x, said in ((_STRAIGHT, "attention cut"), (_BENT, "output replaced")):
        axes.text(x, high + 0.3, said, ha="center", va="center", fontsize=7.5, color=GREY)
    keys = [Line2D([], [], color=BLUE, lw=3), Line2D([], [], color=ORANGE, lw=3, ls=(0, (3, 1.2)))]
    axes.legend(
        keys,
        ["supports it: cutting lowers it", "opposes it: cutting raises it"],
        title=f"change of {plain(label)}",
        title_fontsize=8.5,
        fontsize=8,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.45 / axes.get_window_extent().height * axes.figure.dpi),
    )
