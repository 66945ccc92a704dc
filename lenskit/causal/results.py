"""What patching found: a number for each site, and how far two methods agree on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Patching(Displayed):
    """The measure with one site after the other patched.

    ``values``: the measure, a row for each block (or window of blocks) and a column for each
    position (or span of positions) or head. ``blocks``: the blocks of each row. ``places``: the
    positions, or the head, of each column; ``names``: the tokens there as text. ``axes``: what rows
    and columns are. ``plain``: the measure of the prompt with nothing patched; ``source``: that of
    the source prompt, nan where the source is none. ``method``: "patching", "attribution" for
    its approximation, or "knock-out" for what ``knock_out`` cuts.
    """

    values: Float[Tensor, "block place"]
    plain: float
    source: float
    blocks: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    axes: tuple[Literal["block"], Literal["pos", "head"]]
    at: str
    measure: str
    method: Literal["patching", "attribution", "knock-out"]
    model: str

    def _headline(self) -> str:
        rows, columns = self.values.shape
        return f"{self.method.capitalize()} of {self.at}, {rows} × {columns} sites"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {
            "measure": self.measure,
            "axes": " × ".join(
                f"{name} {size}" for name, size in zip(self.axes, self.values.shape, strict=True)
            ),
            "plain": self.plain,
            "source": "no prompt" if math.isnan(self.source) else self.source,
            "places": quoted(self.names),
        }
        for order, (row, column) in enumerate(self.top(5), start=1):
            effect = float(self.effects[row, column])
            shown[f"site {order}"] = f"{effect:+.4g} at {self.site(row, column)}"
        return shown

    @property
    def effects(self) -> Float[Tensor, "block place"]:
        """What each patch changes: the measure minus ``plain``."""
        return self.values - self.plain

    @property
    def restored(self) -> Float[Tensor, "block place"]:
        """The share of the way from ``plain`` (0) to ``source`` (1) that each patch goes.

        Raises ``ValueError`` where there is no source prompt, or no way to go.
        """
        way = self.source - self.plain
        if math.isnan(way) or abs(way) < 1e-6:
            raise ValueError(
                f"nothing can be restored: the measure is {self.plain:.4g} for the prompt and "
                f"{self.source:.4g} for the source; read effects instead"
            )
        return self.effects / way

    def top(self, number: int = 10) -> list[tuple[int, int]]:
        """Row and column of the sites with the greatest effects, whatever their sign."""
        number = min(whole("number", number, 1), self.values.numel())
        order = self.effects.abs().flatten().argsort(descending=True, stable=True)[:number]
        return [divmod(place, self.values.shape[1]) for place in order.tolist()]

    def site(self, row: int, column: int) -> str:
        """A site in words."""
        where = self.names[column]
        if self.axes[1] == "pos":
            where = f"{_span(self.places[column], 'position')}, {where!r}"
        return f"{_span(self.blocks[row], 'block')}, {where}"

    def figure(self, *, restored: bool = False, ax: Axes | None = None) -> Figure:
        """A heat map of the effects, or of what is restored."""
        from lenskit.figures import site_map

        values = self.restored if restored else self.effects
        what = "restored share" if restored else f"change of {self.measure}"
        return site_map(
            values,
            [_span(window, "") for window in self.blocks],
            self.names,
            label=what,
            place="token" if self.axes[1] == "pos" else "head",
            title=f"{self.method} of {self.at}",
            ax=ax,
        )


@dataclass(frozen=True, repr=False)
class Agreement(Displayed):
    """How far an approximation agrees with exact patching, over all sites.

    ``spearman`` and ``pearson``: correlation of the effects, nan where one is constant.
    ``overlap``: the share of the exact method's ``top`` sites (by size of effect) that are among
    the approximation's; ``chance``: the same expected of sites drawn at random.
    """

    spearman: float
    pearson: float
    overlap: float
    chance: float
    top: int
    sites: int


def agreement(exact: Patching, approximate: Patching, *, top: int = 10) -> Agreement:
    """Rank correlation and top-k overlap of two results over the same sites.

    Raises ``ValueError`` for results of different sites or measures.

    >>> pair, options = ("What do you like?", "What do you fear?"), {"target": "I", "at": "mlp_out"}
    >>> exact = lk.causal.patch(model, *pair, **options, positions=[-1])
    >>> fast = lk.causal.attribute(model, *pair, **options, positions=[-1])
    >>> lk.causal.agreement(exact, fast, top=2).sites == model.cfg.n_layers
    True
    """
    for name in ("blocks", "places", "axes", "at", "measure", "model"):
        if getattr(exact, name) != getattr(approximate, name):
            raise ValueError(
                f"the results have different {name}: {getattr(exact, name)} and "
                f"{getattr(approximate, name)}"
            )
    sites = exact.values.numel()
    top = whole("top", top, 1, sites)
    one, other = (each.effects.double().flatten().numpy() for each in (exact, approximate))
    constant = min(one.std(), other.std()) == 0 or sites < 2
    spearman, pearson = (
        float("nan") if constant else float(correlation(one, other).statistic)
        for correlation in (spearmanr, pearsonr)
    )
    shared = {*exact.top(top)} & {*approximate.top(top)}
    return Agreement(spearman, pearson, len(shared) / top, top / sites, top, sites)


def _span(numbers: tuple[int, ...], noun: str) -> str:
    """ "block 3", "blocks 2-4", "positions 1, 5"."""
    run = len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    told = f"{numbers[0]}-{numbers[-1]}" if run else ", ".join(map(str, numbers))
    return f"{noun}{'s' * (len(numbers) > 1 and bool(noun))} {told}".strip()
