"""What is measured of a model that follows the grammar: one concept, one row of figures.

Each figure is defined on ``lenskit``'s own public steps; ``ablation`` and ``evaluate`` average
them over concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept, concepts
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.recipe import with_concepts
from lenskit.figures import activity_correlation
from lenskit.labels import GRADED, auroc, gating_head, soft_labels, true_activity
from lenskit.prompts import build_prompts
from lenskit.selector import select_tokens
from lenskit.study import Study, Variant, study_concept

COEFFICIENTS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22)
STEERED: Mapping[str, Variant] = MappingProxyType(
    {
        "prompted": Variant(control="prompted"),
        "attention token, hard, mean difference": Variant(labels="hard", learner="mean difference"),
        "attention token, hard, covariance": Variant(labels="hard", learner="covariance"),
        "attention token, soft, covariance": Variant(labels="soft", learner="covariance"),
        "attention token, hard, RFM": Variant(labels="hard", learner="rfm"),
        "attention token, soft, RFM": Variant(labels="soft", learner="rfm"),
        "token -1, hard, mean difference": Variant("-1", "hard", "mean difference"),
        "token -3, hard, mean difference": Variant("-3", "hard", "mean difference"),
    }
)


def gating_auroc(capture: Capture) -> float:
    """AUROC of the gating label for «active more often than not», over prompts with a prefix.

    Prompts whose true rate is graded (between 0.1 and 0.9) are left out.
    """
    rate = true_activity(capture.prompts)
    low, high = GRADED
    clear = capture.prompts.has_prefix & ((rate <= low) | (rate >= high))
    return auroc(gating_head(capture).label[clear], rate[clear] > 0.5)


def activity_followed(capture: Capture) -> float:
    """Rank correlation of soft labels (Eq. 4) with true activity, at the best block."""
    labels = soft_labels(capture, select_tokens(capture), constant="hard")
    return float(activity_correlation(capture, labels).nan_to_num(nan=-1.0).max())


def concept_measures(
    model: TransformerBridge,
    concept: Concept,
    *,
    prompts: int = 160,
    steered: Mapping[str, Variant] = STEERED,
    coefficients: Sequence[float] = COEFFICIENTS,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of one concept, by name.

    "activity followed", "gating label, AUROC", and for each of ``steered`` the share of the test
    questions answered on concept, best over the coefficients, which are in units of each block's
    mean residual norm; with ", held out" the coefficient chosen on other questions.
    """
    captured = capture(
        model, build_prompts(model, concept, number=prompts, seed=seed), progress=False
    )
    rows = study_concept(
        model,
        concept,
        list(steered.values()),
        coefficients=coefficients,
        prompts=prompts,
        seed=seed,
    )
    table = Study(pd.DataFrame(rows)).concepts.set_index(
        ["token", "labels", "learner", "blocks", "control"]
    )
    found = {
        "activity followed": activity_followed(captured),
        "gating label, AUROC": gating_auroc(captured),
    }
    for name, v in steered.items():
        row = table.loc[(v.token, v.labels, v.learner, v.blocks, v.control)]
        found[name] = float(row["best"])
        if not v.control:
            found[f"{name}, held out"] = float(row["held_out"])
    return found


def measured_concepts(grammar: Grammar, number: int) -> list[Concept]:
    """``number`` of the grammar's concepts, evenly over its classes."""
    few = with_concepts(grammar, number)
    return [concepts[e.concept_class][e.name] for e in few.entries]


def mean_measures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over concepts, those without one (NaN) left out."""
    return {str(name): float(value) for name, value in pd.DataFrame(rows).mean().items()}
