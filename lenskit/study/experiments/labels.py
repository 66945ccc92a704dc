"""Which labels vectors should be learnt from, and whether labels can matter at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from lenskit.concepts import Concept
from lenskit.labels import LABELS, displacement_cosine, gating_head, rank_correlation, true_activity
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, Run, begun
from lenskit.study.experiments.scores import CONCEPT, by_concept, summary
from lenskit.study.experiments.setting import Setting, given
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant

NUMBERS = (8, 24, 80, 160, 400)
_LEARNERS = ("covariance", "ridge", "rfm")


def labels(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    numbers: Sequence[int] = NUMBERS,
    learners: Sequence[str] = _LEARNERS,
    **options: Any,
) -> Experiment:
    """Hard labels, soft ones (Eq. 4), those of a gating head and the true activity, compared.

    For several learners and numbers of prompts, at the attention-guided token, in all blocks; the
    true activity where the model speaks the embedded grammar. ``parts``: "displacement", the cosine
    of the displacements of inactive and active prompts by block (``displacement_cosine``; by the
    truth where it is known, and by the gating label), which says whether labels can matter; and
    "gain", what each label gains over hard ones beside that cosine, concept by concept.

    ``options`` as in ``tokens``; ``prompts`` are 400 by default.
    """
    options = given(options, prompts=max(numbers))
    with begun("labels", model, concepts, options) as run:
        # "gating or hard" is one of these two for each concept.
        left_out = {"gating or hard"} if run.setting.exact else {"gating or hard", "true activity"}
        kinds = [each for each in LABELS if each not in left_out]
        kinds.sort(key=lambda kind: kind != "hard")
        most = run.setting.prompts
        counts = sorted({min(number, most) for number in numbers} | {most}, reverse=True)
        ways = [
            _way(kind, learner, number)
            for number in counts
            for learner in learners
            for kind in kinds
        ]
        measure = Measure("displacement", _displacement)
        everything = [*ways, *controls(Variant("attention", "hard"), several=run.several)]
        run.prepare(*everything, measure)
        answers, displaced = run.answers(everything), run.measured(measure)
        by_block = displaced.assign(way=displaced["activity"] + ", block " + displaced["block"])
        return run.scored(
            answers,
            "Which labels should a concept vector be learnt from?",
            reference="hard labels, as many prompts",
            references={way.name: _like(way, "hard").name for way in ways},
            parts={
                "displacement": summary(by_block, ["cosine", "p value"], seed=run.setting.seed),
                "gain": _gain(run, answers, displaced, learners),
            },
            notes=[
                "Where the cosine of displacements is near 1, inactive prompts carry the concept "
                "all the same, and labels can tell a learner nothing. p value: of «no head's "
                "attention falls into two groups», without which there is no gating label."
            ],
        )


def _way(kind: str, learner: str, number: int) -> Way:
    columns = {"labels": kind, "learner": learner, "prompts": number}
    variant = Variant("attention", kind, learner)
    return Way(f"{kind}, {learner}, {number} prompts", Fitted(variant, number), columns=columns)


def _like(way: Way, kind: str) -> Way:
    """The way with other labels and the same learner and prompts."""
    return _way(kind, way.columns["learner"], way.columns["prompts"])


def _displacement(bench: Bench, setting: Setting) -> Sequence[Row]:
    """Cosines block by block, for every account of activity that there is."""
    capture = bench.capture
    accounts = {"true activity": true_activity(capture.prompts)} if setting.exact else {}
    p_value = float("nan")
    try:
        head = gating_head(capture, seed=setting.seed)
        accounts["gating label"], p_value = head.label, head.p_value
    except ValueError:
        pass  # no attention varies
    tokens = bench.selection("attention")
    return [
        {"activity": name, "block": str(block), "cosine": _known(value), "p value": _known(p_value)}
        for name, rate in accounts.items()
        for block, value in enumerate(displacement_cosine(capture, rate, tokens).tolist())
    ]


def _known(value: float) -> float | None:
    return value if value == value else None


def _gain(
    run: Run, answers: pd.DataFrame, displaced: pd.DataFrame, learners: Sequence[str]
) -> pd.DataFrame:
    """The held-out score of labels less that of hard ones from all prompts, beside the cosine.

    The last column is the rank correlation of both over concepts.
    """
    scores = by_concept(answers).pivot_table(index=CONCEPT, columns="way", values="held out")
    known = "true activity" if run.setting.exact else "gating label"
    cosine = displaced[displaced["activity"] == known].groupby(CONCEPT)["cosine"].mean()
    parts = []
    for learner in learners:
        of = {kind: f"{kind}, {learner}, {run.setting.prompts} prompts" for kind in LABELS}
        for kind, way in of.items():
            if kind == "hard" or way not in scores or of["hard"] not in scores:
                continue
            own = (scores[way] - scores[of["hard"]]).rename("gain").to_frame()
            own = own.join(cosine.rename("displacement cosine")).reset_index()
            parts.append(own.assign(labels=kind, learner=learner, **_correlated(own)))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _correlated(table: pd.DataFrame) -> dict[str, float]:
    both = table[["gain", "displacement cosine"]].dropna().astype(float)
    gain, cosine = (torch.tensor(both[name].to_numpy()) for name in both)
    return {"rank correlation": rank_correlation(gain, cosine)}
