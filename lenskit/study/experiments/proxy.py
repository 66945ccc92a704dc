"""Is attention to the prefix a proxy of the concept's activity?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lenskit.concepts import Concept
from lenskit.labels import GRADED, aurocs, gating_head, rank_correlations
from lenskit.selector import pool_heads
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.proxies import projections, single_numbers, truths
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, summary
from lenskit.study.experiments.setting import Setting

MEASURES = ("AUROC", "rank correlation")
_SITE = ["block", "head", "token"]
# What each proxy is called whose block or head has to be chosen, and how it is.
_CHOSEN = {
    "selected token": "Eq. 4",
    "mean over heads": "mean over heads",
    "head": "one head",
    "projection": "projection on vector",
}


def proxy(model: Model, concepts: Iterable[Concept] | Concept, **options: Any) -> Experiment:
    """Attention to the prefix, and what else may tell in which prompts the concept is active.

    Over prompts with the prefix: AUROC for «active rather than inactive» and rank correlation with
    the rate, of attention by block, head and token, of its mean over heads, of Eq. 4, of the gating
    head, of the projection on the vector, of the divergence of next tokens with and without the
    prefix, and of the divergence when it is knocked out. Where a block or head has to be chosen:
    the median one, the best one by the truth, and the one that is best on all other concepts. The
    truth is the grammar's where it is known, and otherwise whether the model's own answer shows
    the concept. ``parts``: "sites", every block, head and token, mean over concepts; "answers",
    the same table with the answers as the truth, where the grammar's is known.

    ``options`` as in ``tokens``; nothing is steered.
    """
    with begun("proxy", model, concepts, options) as run:
        rows = run.measured(Measure("proxies", _followed))
        known = "true activity" if run.setting.exact else "shown in the answer"
        tables = {
            truth: _compared(rows[rows["truth"] == truth]) for truth in rows["truth"].unique()
        }
        reference = f"{_CHOSEN['selected token']}, median"
        seed = run.setting.seed
        parts = {"sites": _sites(rows[rows["truth"] == known])}
        if known == "true activity":
            parts["answers"] = summary(
                tables["shown in the answer"], MEASURES, reference=reference, seed=seed
            )
        return run.result(
            summary(tables[known], MEASURES, reference=reference, seed=seed),
            "Is attention to the prefix a proxy of the concept's activity?",
            reference=reference,
            parts=parts,
            notes=[
                f"Truth: {known}. AUROC over prompts that are active at a rate of {GRADED[1]} or "
                f"more, or of {GRADED[0]} or less. Concepts of which all prompts are alike have no "
                "AUROC. «best by the truth» is optimistic; «chosen elsewhere» is the choice that "
                "is best on all other concepts."
            ],
        )


def _followed(bench: Bench, setting: Setting) -> Sequence[Row]:
    """Both figures of every proxy at every site, by every account of the truth."""
    capture = bench.paired
    prefixed = capture.prompts.has_prefix
    attention = capture.attention_to_prefix[prefixed]
    mean = pool_heads(attention, "mean")
    offsets = [place - attention.shape[-1] for place in range(attention.shape[-1])]
    blocks, heads = range(attention.shape[1]), range(attention.shape[2])
    sites: dict[str, tuple[Tensor, list[tuple[Any, Any, Any]]]] = {
        "selected token": (
            bench.selection("attention").take(mean),
            [(block, None, None) for block in blocks],
        ),
        "mean over heads": (
            mean.flatten(1),
            [(block, None, token) for block in blocks for token in offsets],
        ),
        "head": (
            attention.flatten(1),
            [(block, head, token) for block in blocks for head in heads for token in offsets],
        ),
        "projection": (projections(bench), [(block, None, None) for block in blocks]),
    }
    for name, values in single_numbers(bench).items():
        sites[name] = (values[:, None], [(None, None, None)])
    try:
        head = gating_head(capture, seed=setting.seed)
        place = (head.block, head.head, head.candidate - attention.shape[-1])
        sites["gating head"] = (head.attention[prefixed][:, None], [place])
    except ValueError:
        pass  # no attention varies
    found: list[Row] = []
    for truth, rate in truths(bench, setting).items():
        clear = (rate >= GRADED[1]) | (rate <= GRADED[0])
        for name, (values, places) in sites.items():
            scores = aurocs(values[clear], rate[clear] > 0.5).tolist()
            ranks = rank_correlations(values, rate).tolist()
            for place, score, rank in zip(places, scores, ranks, strict=True):
                found.append(
                    {"truth": truth, "proxy": name, **dict(zip(_SITE, place, strict=True))}
                    | {"AUROC": _known(score), "rank correlation": _known(rank)}
                )
    return found


def _known(value: float) -> float | None:
    return value if value == value else None


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each concept and proxy, the block or head chosen in each of three manners."""
    rows = rows.astype({name: float for name in MEASURES})
    parts = []
    for name, own in rows.groupby("proxy", sort=False):
        said = _CHOSEN.get(str(name))
        if said is None:
            parts.append(own.assign(way=name))
            continue
        grouped = own.groupby(CONCEPT, sort=False)
        parts.append(_each(grouped[list(MEASURES)].median(), f"{said}, median"))
        parts.append(_each(grouped[list(MEASURES)].max(), f"{said}, best by the truth"))
        parts.append(_elsewhere(own, f"{said}, chosen elsewhere"))
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return table[[*CONCEPT, "way", *MEASURES]].dropna(subset=list(MEASURES), how="all")


def _each(table: pd.DataFrame, way: str) -> pd.DataFrame:
    return table.reset_index().assign(way=way)


def _elsewhere(rows: pd.DataFrame, way: str) -> pd.DataFrame:
    """For each concept the site with the highest mean AUROC over all other concepts.

    Or rank correlation, where no concept has prompts of both kinds.
    """
    sites = rows.assign(site=list(map(str, rows[_SITE].itertuples(index=False, name=None))))
    by = next((name for name in MEASURES if rows[name].notna().any()), MEASURES[0])
    wide = sites.pivot_table(index=CONCEPT, columns="site", values=by, sort=False)
    found = []
    for concept in wide.index:
        others = wide.drop(index=concept).mean()
        if not others.notna().any():
            continue
        own = sites[(sites["concept_class"] == concept[0]) & (sites["concept"] == concept[1])]
        found.append(own[own["site"] == others.idxmax()].assign(way=way))
    return pd.concat(found, ignore_index=True) if found else rows.iloc[:0].assign(way=way)


def _sites(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over concepts at every site, of all concepts and of each class."""
    rows = rows.astype({name: float for name in MEASURES})
    keys = ["proxy", *_SITE]
    parts = [rows.assign(concept_class="all")]
    if rows["concept_class"].nunique() > 1:
        parts.append(rows)
    table = pd.concat(parts, ignore_index=True)
    grouped = table.groupby(["concept_class", *keys], sort=False, dropna=False)
    return grouped[list(MEASURES)].mean().reset_index()
