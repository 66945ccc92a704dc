"""Which concepts cannot be steered, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from lenskit.concepts import Concept
from lenskit.labels import displacement_cosine, gating_head, rank_correlation, true_activity
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.block_scores import agreement, held_out_correlation
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, by_concept
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant

_OWN = Variant()
_RECIPE, _EACH = "the recipe", "each closing token its own vector"


def classes(model: Model, concepts: Iterable[Concept] | Concept, **options: Any) -> Experiment:
    """The recipe on every concept: which classes fail, by which reasons of the judge, and why.

    ``parts``: "reasons", the share of each of the judge's reasons by class and way, at the
    coefficient that moves the model by the experiment's target and at the best one; "concepts", a
    row for each with its scores, its commonest reason where it fails and what was measured of it
    without any answer; "predictors", the rank correlation of each of these with the held-out score.

    ``options`` as in ``tokens``. The measure "steerable" is the share of concepts that any
    coefficient brings into any answer.
    """
    with begun("classes", model, concepts, options) as run:
        ways = [
            Way(_RECIPE, Fitted(_OWN)),
            Way(_EACH, Fitted(replace(_OWN, token="each"))),
        ]
        measure = Measure("what was measured of the concept", _measured)
        everything = [*ways, *controls(_OWN, several=run.several)]
        run.prepare(*everything, measure)
        answers, measured = run.answers(everything), run.measured(measure)
        concepts_table = _concepts(answers, measured)
        return run.scored(
            answers,
            "Which concepts cannot be steered, and why?",
            parts={
                "reasons": reasons(answers),
                "concepts": concepts_table,
                "predictors": _predictors(concepts_table, list(measured.columns[2:])),
            },
        )


def _measured(bench: Bench, setting: Setting) -> Sequence[Row]:
    """What may tell beforehand whether the concept can be steered; means over blocks."""
    capture = bench.capture
    tokens = bench.selection("attention")
    attention = capture.attention_to_prefix[capture.prompts.has_prefix].mean(dim=(0, 2))
    row: dict[str, float] = {
        "attention to the prefix": float(attention.max(dim=-1).values.mean()),
        "held-out correlation": float(held_out_correlation(bench).mean()),
        "agreement of differences": float(agreement(bench).mean()),
        "prefix tokens": float(capture.prompts.prefix_mask.sum(dim=1).max()),
        "tokens selected": float(len(tokens.index.unique())),
    }
    try:
        head = gating_head(capture, seed=setting.seed)
        row["p value of gating"] = head.p_value
        rate = true_activity(capture.prompts) if setting.exact else head.label
        row["displacement cosine"] = float(displacement_cosine(capture, rate, tokens).nanmean())
    except ValueError:
        pass  # no attention varies
    return [{name: value if value == value else None for name, value in row.items()}]


def reasons(answers: pd.DataFrame) -> pd.DataFrame:
    """Shares of the judge's reasons by class, way and choice of coefficient."""
    judged = answers[answers["score"].notna()]
    best = by_concept(answers)[[*CONCEPT, "way", "coefficient"]]
    at_best = judged.merge(best, on=[*CONCEPT, "way", "coefficient"])
    parts = {
        "same divergence": judged[judged["calibrated"].astype(bool)],
        "best coefficient": at_best[~at_best["calibrated"].astype(bool)],
    }
    found = []
    for name, own in parts.items():
        for of in ("all", *own["concept_class"].unique()):
            part = own if of == "all" else own[own["concept_class"] == of]
            shares = part.groupby("way", sort=False)["reason"].value_counts(normalize=True)
            table = shares.rename("share").reset_index()
            found.append(table.assign(concept_class=of, coefficient=name, answers=len(part)))
    columns = ["concept_class", "way", "coefficient", "reason", "share", "answers"]
    return pd.concat(found, ignore_index=True)[columns]


def _concepts(answers: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    rows = by_concept(answers)
    own = rows[rows["way"] == _RECIPE].drop(columns="way")
    ceiling = rows[rows["way"] == "prefix in the prompt"][[*CONCEPT, "best"]]
    failed = answers[(answers["way"] == _RECIPE) & (answers["score"] == 0)]
    failed = failed.merge(own[[*CONCEPT, "coefficient"]], on=[*CONCEPT, "coefficient"])
    reason = (
        failed.groupby(CONCEPT, sort=False)["reason"]
        .agg(lambda values: values.mode().iloc[0])
        .rename("commonest failure")
        .reset_index()
    )
    table = own.merge(ceiling.rename(columns={"best": "prefix in the prompt"}), on=CONCEPT)
    return table.merge(reason, on=CONCEPT, how="left").merge(measured, on=CONCEPT, how="left")


def _predictors(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for name in ("prefix in the prompt", *names):
        both = table[[name, "held out"]].astype(float).dropna()
        values, score = (torch.tensor(both[each].to_numpy()) for each in both)
        rows.append(
            {"measured": name, "rank correlation": rank_correlation(values, score)}
            | {"concepts": len(both)}
        )
    return pd.DataFrame(rows)
