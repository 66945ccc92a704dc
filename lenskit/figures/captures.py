"""Pictures of one concept's prompts: attention, selected tokens, labels, activations, blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from lenskit._arguments import block_numbers
from lenskit.figures.style import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    RED,
    end_labels,
    legend,
    new_figure,
    panel,
    plain,
    styled,
    token_colours,
)
from lenskit.labels import true_activity
from lenskit.selector import TokenSelection, pool_heads

if TYPE_CHECKING:
    from lenskit.capture import Capture
    from lenskit.enrichment import Enrichment
from lenskit.prompts import PromptSet


@styled()
def attention_map(
    capture: Capture,
    tokens: TokenSelection | None = None,
    *,
    heads: Literal["mean", "max"] = "mean",
    prompts: Literal["max", "mean"] = "max",
    ax: Axes | None = None,
) -> Figure:
    """Attention mass from each candidate token to the prefix, at each block.

    Pooled over heads, and over the prompts with a prefix, as in ``select_tokens``; the selected
    tokens are framed.
    """
    if tokens is not None:
        tokens.check(capture.candidates, capture.layers)
    attention = pool_heads(capture.attention_to_prefix[capture.prompts.has_prefix], heads)
    values = (attention.amax(0) if prompts == "max" else attention.mean(0)).numpy()
    blocks, places = values.shape
    alt = f"Attention to the prefix, by block (0 to {blocks - 1}) and candidate token ({places})"
    figure, axes = panel(ax, 2.4 + 1.2 * places, max(3.4, 1.5 + 0.32 * blocks), alt)
    image = axes.imshow(values, aspect="auto", vmin=0)
    for (block, place), value in np.ndenumerate(values):
        shade = INK if sum(image.cmap(image.norm(value))[:3]) > 1.5 else "white"
        axes.text(place, block, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9)
    for block, place in enumerate([] if tokens is None else tokens.index.tolist()):
        corner = (place - 0.48, block - 0.45)
        axes.add_patch(Rectangle(corner, 0.96, 0.9, fill=False, edgecolor=RED, linewidth=2.2))
    axes.set_xticks(range(places), _candidate_names(capture.candidates, "\n"), fontsize=8)
    axes.set_yticks(range(blocks))
    axes.set(xlabel="candidate token", ylabel="block", title=plain(capture.prompts.concept.prefix))
    over = f"{heads} over heads, {prompts} over {len(attention)} prompts"
    how = f"attention to the prefix, 0 to 1\n({over})"
    figure.colorbar(image, ax=axes).set_label(how, fontsize=9)
    return figure


@styled()
def selected_token_map(
    selections: Mapping[str, TokenSelection], *, ax: Axes | None = None
) -> Figure:
    """The token selected in each block: a row for each name (a concept, say)."""
    candidates = _shared_candidates(selections.values())
    index = np.stack([one.index.numpy() for one in selections.values()])
    colours = np.array([to_rgb(colour) for colour in token_colours(len(candidates))])
    alt = f"The token selected in each block, one row for each of {len(selections)} names"
    figure, axes = panel(ax, 4.4 + 0.35 * index.shape[1], 1.4 + 0.21 * len(selections), alt)
    axes.imshow(colours[index], aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(selections)), [plain(name) for name in selections], fontsize=8.5)
    axes.set_xticks(range(index.shape[1]))
    for edges, axis in ((index.shape[1], axes.axvline), (len(selections), axes.axhline)):
        for edge in range(1, edges):
            axis(edge - 0.5, color="white", linewidth=1)
    axes.set(xlabel="block", title=f"selected tokens, n = {len(selections)}")
    _token_legend(axes, ax is None, candidates)
    return figure


@styled()
def selected_token_shares(selections: Mapping[str, Sequence[TokenSelection]]) -> Figure:
    """How often each candidate token is selected, by block: a panel for each name (a class)."""
    candidates = _shared_candidates(one for own in selections.values() for one in own)
    index = {name: torch.stack([one.index for one in own]) for name, own in selections.items()}
    blocks = np.arange(next(iter(index.values())).shape[1])
    figure, panels = new_figure(
        3.6 + 0.45 * len(blocks), 1 + 0.9 * len(index), len(index), sharex=True, sharey=True
    )
    for axes, (name, own) in zip(panels, index.items(), strict=True):
        bottom = np.zeros(len(blocks))
        for place, colour in enumerate(token_colours(len(candidates))):
            share = 100 * (own == place).float().mean(0).numpy()
            axes.bar(blocks, share, 0.92, bottom, color=colour)
            bottom += share
        axes.set(ylim=(0, 100), yticks=(0, 50, 100), xlim=(-0.6, len(blocks) - 0.4), xticks=blocks)
        axes.set_title(f"{plain(name)} (n = {len(own)} concepts)", fontsize=10, pad=3)
    number = sum(map(len, index.values()))
    figure.alt = f"How often each candidate token is selected, by block and class; n = {number}"
    panels[-1].set_xlabel("block")
    figure.supylabel("share of concepts, %", fontsize=10)
    _token_legend(panels[0], True, candidates)
    return figure


@styled()
def soft_label_curves(
    capture: Capture,
    labels: Float[Tensor, "prompt layer"],
    *,
    blocks: Iterable[int] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Labels of the prompts with a prefix, sorted: a line for each block (by default all)."""
    _check_labels(labels, capture)
    number = labels.shape[1]
    chosen = block_numbers("blocks", blocks, number)
    values = labels[capture.prompts.has_prefix].sort(dim=0, descending=True).values.numpy()
    share = 100 * (np.arange(len(values)) + 0.5) / len(values)
    name = capture.prompts.concept.name
    alt = (
        f"Labels of {len(values)} prompts with the prefix of {name}, sorted, a line for each block"
    )
    figure, axes = panel(ax, 6.4, 3.9, alt)
    for order, block in enumerate(chosen):
        # The palest part of the map would vanish on white.
        colour = colormaps["cividis"](0.85 * block / max(1, number - 1))
        axes.plot(share, values[:, block], color=colour)
        at = int((0.06 + 0.6 * (order + 0.5) / len(chosen)) * (len(values) - 1))
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": colour}
        mark = {"ha": "center", "va": "center", "fontsize": 8, "color": colour, "bbox": box}
        axes.text(share[at], values[at, block], str(block), **mark)
    axes.set(xlim=(0, 100), ylim=(0, 1.03))
    axes.set_xlabel(f"prompts with the prefix, sorted, % (n = {len(values)})")
    axes.set(ylabel="label, 0 to 1", title=f"{plain(name)}: labels by block (numbers)")
    return figure


@styled()
def activation_pca(
    capture: Capture,
    tokens: TokenSelection,
    labels: Float[Tensor, "prompt layer"],
    *,
    block: int,
    activity: Float[Tensor, " prompt"] | None = None,
) -> Figure:
    """Two principal components of a block's unit rows, coloured by label and by true activity.

    ``activity``: the true rate at which a prompt is answered in the concept's voice; by default
    the embedded grammar's, where the concept is one of its own.
    """
    tokens.check(capture.candidates, capture.layers)
    _check_labels(labels, capture)
    rows = tokens.take(capture.resid_post)[:, block].double()
    rows = torch.nn.functional.normalize(rows, dim=-1)
    rows = rows - rows.mean(0)
    _, spread, components = torch.linalg.svd(rows, full_matrices=False)
    points = (rows @ components[:2].T).numpy()
    share = (100 * spread.square() / spread.square().sum()).tolist()
    prefixed = capture.prompts.has_prefix.numpy()
    truth = known_activity(capture.prompts) if activity is None else activity
    panels = {"label": labels[:, block]} | ({} if truth is None else {"true activity": truth})
    figure, found = new_figure(0.4 + 4.2 * len(panels), 3.8, 1, len(panels), sharey=True)
    for axes, (name, values) in zip(found, panels.items(), strict=True):
        axes.scatter(*points[~prefixed].T, marker="x", s=18, color=GREY, linewidths=0.8)
        colour = {"c": values.numpy()[prefixed], "vmin": 0, "vmax": 1}
        shown = axes.scatter(*points[prefixed].T, s=22, edgecolors="none", **colour)
        figure.colorbar(shown, ax=axes, label=f"{name}, 0 to 1")
        axes.set(xlabel=f"component 1 ({share[0]:.0f} % of variance)", xticks=[], yticks=[])
    found[0].set_ylabel(f"component 2 ({share[1]:.0f} % of variance)")
    number = (
        f"n = {int(prefixed.sum())} with the prefix (dots), {int((~prefixed).sum())} without (×)"
    )
    name = plain(capture.prompts.concept.name)
    figure.suptitle(f"{name}, block {block}; {number}", x=0.01, ha="left", fontsize=10)
    figure.alt = f"Two principal components of {name}'s activations in block {block}, {number}"
    return figure


@styled()
def enrichment_by_block(
    enrichments: Mapping[str, Enrichment | Sequence[Enrichment]],
    *,
    alpha: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Concept enrichment of each block: a line for each name (a null, say).

    Several enrichments under one name are averaged; the band is their standard error. All are
    read at one level ``alpha``, by default the largest of their own, and the dashed line is what
    chance would give at that level.
    """
    ends: dict[str, tuple[float, Any]] = {}
    groups = {
        name: list(given) if isinstance(given, Sequence) else [given]
        for name, given in enrichments.items()
    }
    level = max(one.alpha for own in groups.values() for one in own) if alpha is None else alpha
    groups = {name: [replace(one, alpha=level) for one in own] for name, own in groups.items()}
    number = sorted({len(own) for own in groups.values()})
    alt = f"Concept enrichment by block for {', '.join(groups)}, with the line of chance"
    figure, axes = panel(ax, 7.0, 3.7, alt)
    for (name, own), colour, mark in zip(groups.items(), COLOURS, MARKERS, strict=False):
        scores = 100 * torch.stack([one.scores for one in own]).double().numpy()
        mean, blocks = scores.mean(0), np.arange(scores.shape[1])
        axes.plot(blocks, mean, color=colour, marker=mark, markersize=5)
        if len(own) > 1:
            error = scores.std(0, ddof=1) / np.sqrt(len(own))
            axes.fill_between(blocks, mean - error, mean + error, color=colour, alpha=0.18, lw=0)
        ends[name] = (mean[-1], colour)
    axes.axhline(100 * level, color=GREY, linestyle="--", linewidth=1.2)
    ends["chance"] = (100 * level, GREY)
    count = "1 concept" if number == [1] else f"{' to '.join(map(str, number))} concepts"
    statements = next(iter(groups.values()))[0].p_values.shape[0]
    axes.set(xticks=blocks, title=plain(title))
    axes.set_xlabel(f"block (n = {count}, {statements} statements each)")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"enrichment: heads and statements\nwith p < {level:g}, %")
    end_labels(axes, ends)
    return figure


def _check_labels(labels: Float[Tensor, "prompt layer"], capture: Capture) -> None:
    """Raise ValueError for labels of another number of prompts or blocks."""
    shape = (len(capture), capture.layers)
    if labels.shape != shape:
        raise ValueError(
            f"labels must be [prompt, layer] = {list(shape)} as the capture, got "
            f"{list(labels.shape)}"
        )


def known_activity(prompts: PromptSet) -> Float[Tensor, " prompt"] | None:
    """The true activity of each prompt, or None where it is not known."""
    try:
        return true_activity(prompts)
    except ValueError:  # not of the grammar
        return None


def _shared_candidates(selections: Iterable[TokenSelection]) -> tuple[str, ...]:
    found = {(one.candidates, len(one.index)) for one in selections}
    if len(found) != 1:
        raise ValueError(
            "selections must share their candidate tokens and number of blocks, and be some; "
            f"got {found}"
        )
    return found.pop()[0]


def _candidate_names(candidates: Sequence[str], between: str = "  ") -> list[str]:
    return [f"{i - len(candidates)}{between}{plain(c)}" for i, c in enumerate(candidates)]


def _token_legend(axes: Axes, own: bool, candidates: Sequence[str]) -> None:
    keys = [Patch(color=colour) for colour in token_colours(len(candidates))]
    # Stacked from below, so that the list stands as the bars do.
    legend(axes, own, keys[::-1], _candidate_names(candidates)[::-1], title="selected token")
