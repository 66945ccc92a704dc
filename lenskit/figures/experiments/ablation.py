"""What each ingredient of the embedded model's training brings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lenskit.figures.experiments.marks import beside, rows_named
from lenskit.figures.experiments.tables import need
from lenskit.figures.style import PALE, new_figure, plain, styled


@styled()
def ablation_compared(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Every figure of each model of ``data/lenskit-mini/ablation.csv``, a mark for each model.

    With the columns ``low``, ``high`` and ``concepts`` marks have intervals and the axis says n.
    Raises ValueError for another table.
    """
    need(table, ["model", "measure", "value"])
    models, names = (list(dict.fromkeys(table[each])) for each in ("model", "measure"))
    counted = "concepts" in table and table["concepts"].notna().any()
    figure, (axes,) = new_figure(8.2, 1.9 + 0.36 * len(names))
    for edge in range(len(names)):
        axes.axhline(edge + 0.5, color=PALE, linewidth=0.5)
    for place, model in enumerate(models):
        rows = table[table["model"] == model].set_index("measure").reindex(names)
        value = rows["value"].to_numpy(dtype=float)
        none = np.full(len(names), np.nan)
        low, high = (rows[e].to_numpy(dtype=float) if e in rows else none for e in ("low", "high"))
        beside(axes, value, low, high, place=place, of=len(models), spread=0.62, name=model)
    rows_named(axes, names)
    said = "mean over concepts (this table keeps neither n nor intervals)"
    if counted:
        n = table["concepts"].dropna().astype(int)
        span = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
        said = f"mean, 95 % interval (n = {span} concepts)"
    axes.set_xlabel(said)
    figure.legend(loc="outside lower left", ncols=2, fontsize=9)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
    figure.alt = f"{', '.join(names)} of the models {', '.join(models)}"
    return figure
