"""How much better one way of steering is than another, concept by concept."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from lenskit.scoring import mean_interval
from lenskit.study.study import KEYS, Study
from lenskit.study.ways import Variant


def paired_differences(
    study: Study,
    to: Variant | None = None,
    *,
    score: Literal["best", "held_out"] = "held_out",
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each variant's score less that of ``to`` (by default the first), over the same concepts.

    A row for each variant: its ``score`` (0 to 1), the mean ``difference`` over the ``concepts``
    that have both, the ends ``low`` and ``high`` of its interval at ``level`` (percentiles of
    ``draws`` bootstrap samples of concepts), and ``steerable``, the share of concepts of which the
    best coefficient makes at least one answer show the concept. With a single concept there is no
    interval, and its ends are NaN. Raises ValueError where ``to`` is not in the study.

    >>> options = {"coefficients": 0.04, "prompts": 40, "max_new_tokens": 3, "progress": False}
    >>> study = lk.run_study(model, concept, lk.variants(controls="unsteered"), **options)
    >>> lk.paired_differences(study)["control"].tolist()
    ['', 'unsteered']
    """
    rows = study.concepts.set_index(["concept_class", "concept"])
    found = {key: own for key, own in rows.groupby(KEYS, sort=False)}
    first = next(iter(found)) if to is None else tuple(getattr(to, key) for key in KEYS)
    if first not in found:
        raise ValueError(f"to={to} is not in the study, which has {[*map(tuple, found)]}")
    table = []
    for key, own in found.items():
        paired = (own[score] - found[first][score]).dropna()
        low, high = mean_interval(paired.to_numpy(), level=level, draws=draws, seed=seed)
        table.append(
            dict(zip(KEYS, key, strict=True))
            | {score: own[score].mean(), "difference": paired.mean(), "low": low, "high": high}
            | {"steerable": float((own["best"] > 0).mean()), "concepts": len(paired)}
        )
    return pd.DataFrame(table)
