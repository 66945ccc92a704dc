"""Which blocks should be steered, how many, and whether enrichment finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import torch

from lenskit.concepts import Concept
from lenskit.labels import rank_correlation
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.block_scores import (
    BLOCK_SCORES,
    BlockScore,
    Drawn,
    InBlocks,
    Stretch,
    Top,
)
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, by_concept, summary
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant


def blocks(model: Model, concepts: Iterable[Concept] | Concept, **options: Any) -> Experiment:
    """One block to all of them, chosen by enrichment and by other scores, beside controls.

    The k blocks that are most enriched (permutations of keys), the least enriched, k drawn at
    random, and the early, middle and late ones; the best k by the other nulls, by the vector's
    held-out correlation, by the agreement among paired differences, and by a logit lens. k doubles
    from 1. ``parts``: "ranking" says how well each score orders the blocks as steering each alone
    does (rank correlation over at most eight), "nulls" how alike the three nulls order them.

    ``options`` as in ``tokens``.
    """
    with begun("blocks", model, concepts, options) as run:
        ways = _ways(run.shape.blocks)
        alone = [_alone(block) for block in run.shape.some_blocks]
        measure = Measure("block scores", _scores)
        own = Variant()
        everything = [*ways, *controls(own, several=run.several), *alone]
        run.prepare(*everything, measure)
        answers, scores = run.answers(everything), run.measured(measure)
        single = by_concept(answers[answers["way"].isin([way.name for way in alone])])
        seed = run.setting.seed
        return run.scored(
            answers,
            "Which blocks should be steered, and does enrichment find them?",
            parts={
                "ranking": summary(_ranking(scores, single), ["rank correlation"], seed=seed),
                "nulls": summary(_nulls(scores), ["rank correlation"], seed=seed),
                "block scores": scores,
            },
            notes=[
                "ranking: of a score with the held-out score of each block steered alone, over "
                "blocks; concepts that no block steers have none."
            ],
        )


def _ways(number: int) -> list[Way]:
    own = Variant()
    ways = [Way("all blocks", Fitted(own), columns={"chosen by": "all", "k": number})]
    k = 1
    while k < number:
        choices: dict[str, Any] = {
            f"top {k} by {name}": Top(score, k) for name, score in BLOCK_SCORES.items()
        }
        choices[f"bottom {k} by enrichment"] = Top(BLOCK_SCORES["enrichment"], k, lowest=True)
        choices[f"random {k}"] = Drawn(k)
        choices |= {f"{where} {k}": Stretch(where, k) for where in ("early", "middle", "late")}
        for name, choose in choices.items():
            by = name.replace(f" {k}", "", 1)
            ways.append(Way(name, InBlocks(own, choose), columns={"chosen by": by, "k": k}))
        k *= 2
    return ways


def _alone(block: int) -> Way:
    made = Fitted(Variant(blocks=str(block)))
    return Way(f"block {block}", made, columns={"chosen by": "alone", "k": 1})


def _scores(bench: Bench, setting: Setting) -> Sequence[Row]:
    """Every score of every block; none of a score that a concept or model does not have."""
    return [
        {"by": name, "block": block, "value": value}
        for name, score in BLOCK_SCORES.items()
        for block, value in enumerate(_or_none(score, bench))
    ]


def _or_none(score: BlockScore, bench: Bench) -> list[float]:
    try:
        return [float(value) for value in score(bench).tolist()]
    except ValueError:
        return []


def _ranking(scores: pd.DataFrame, single: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of each score with steerability, over the blocks that were steered alone."""
    single = single.assign(block=single["way"].str.removeprefix("block ").astype(int))
    steered = single.set_index([*CONCEPT, "block"])["held out"]
    rows = []
    for (of, concept, name), own in scores.groupby([*CONCEPT, "by"], sort=False):
        values = own.set_index("block")["value"]
        reached = steered.loc[of, concept]
        both = pd.concat([values, reached], axis=1).dropna()
        rows.append(
            {"concept_class": of, "concept": concept, "way": name}
            | {"rank correlation": _correlation(both.iloc[:, 0], both.iloc[:, 1])}
        )
    return pd.DataFrame(rows)


def _nulls(scores: pd.DataFrame) -> pd.DataFrame:
    nulls = [name for name in BLOCK_SCORES if name.startswith("enrichment")]
    rows = []
    for (of, concept), own in scores.groupby(CONCEPT, sort=False):
        table = own.pivot_table(index="block", columns="by", values="value")
        for one, other in combinations([name for name in nulls if name in table], 2):
            rows.append(
                {"concept_class": of, "concept": concept, "way": f"{one} and {other}"}
                | {"rank correlation": _correlation(table[one], table[other])}
            )
    return pd.DataFrame(rows, columns=[*CONCEPT, "way", "rank correlation"])


def _correlation(one: pd.Series, other: pd.Series) -> float:
    return rank_correlation(torch.tensor(one.to_numpy()), torch.tensor(other.to_numpy()))
