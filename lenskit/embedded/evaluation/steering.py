"""What steers: tokens, labels and learners on many concepts, with controls and paired intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields, replace
from typing import Any, Literal

from lenskit.concepts import Concept
from lenskit.embedded.evaluation.subject import Subject
from lenskit.scoring import Verdict, grammar_judge
from lenskit.study import Study, Variant, paired_differences, run_study

SOFT = Variant("attention", "soft", "covariance")
KINDS = ("hard", "soft", "gating", "true activity")
SHUFFLED = ("balanced shuffle", "shuffled labels")
FIXED = ("-1", "-2", "-3", "-4", "-5")
KEYS = [each.name for each in fields(Variant)]
BLOCKS = ("top4", "random4", "bottom4")


VARIANTS: Mapping[str, Variant] = {
    **{f"{kind}, covariance": replace(SOFT, labels=kind) for kind in KINDS},
    **{f"{kind}, RFM": replace(SOFT, labels=kind, learner="rfm") for kind in KINDS},
    **{f"token {token}, soft, covariance": replace(SOFT, token=token) for token in FIXED},
    **{name: replace(SOFT, labels="hard", control=name) for name in SHUFFLED},
    "prompted": replace(SOFT, control="prompted"),
}


def exact(concept: Concept, question: str, answer: str) -> Verdict:
    """The judge of the grammar; a study refuses it for a checkpoint that says no sentence yet."""
    return grammar_judge(concept, question, answer)


def comparison(study: Study, better: Variant, than: Variant) -> dict[str, dict[str, float]]:
    """By ``best`` and ``held_out``: the paired difference over concepts, its interval, n."""
    kinds: tuple[Literal["best", "held_out"], ...] = ("best", "held_out")
    found: dict[str, dict[str, float]] = {}
    for score in kinds:
        row = paired_differences(study, than, score=score).set_index(KEYS).loc[astuple(better)]
        found[score] = {
            "mean": float(row["difference"]),
            "low": float(row["low"]),
            "high": float(row["high"]),
            "n": int(row["concepts"]),
        }
    return found


def scores(study: Study, named: Mapping[str, Variant]) -> dict[str, dict[str, float]]:
    """For each variant the means over concepts: best, held out, and the best one coefficient."""
    table = study.compare().set_index(KEYS)
    single = study.answers.groupby([*KEYS, "coefficient"])["score"].mean().groupby(KEYS).max()
    return {
        name: {
            "best": float(table.loc[astuple(variant), "best"]),
            "held out": float(table.loc[astuple(variant), "held_out"]),
            "one coefficient": float(single.loc[astuple(variant)]),
            "n": int(table.loc[astuple(variant), "concepts"]),
        }
        for name, variant in named.items()
    }


def _study(subject: Subject, name: str, named: Mapping[str, Variant], **options: Any) -> Study:
    settings: dict[str, Any] = {
        "coefficients": subject.scale.coefficients,
        "prompts": subject.scale.prompts,
        "relative": True,
        "judge": exact,
        "seed": subject.seed,
    }
    return run_study(
        subject.model,
        subject.concepts,
        list(named.values()),
        out=subject.work / name,
        **settings | options,
    )


def steering(subject: Subject) -> dict[str, Any]:
    """Every variant's scores, and the paper's claims as paired differences."""
    study = _study(subject, "steering", VARIANTS)
    pairs = {
        **{f"attention token over token {t}": (SOFT, replace(SOFT, token=t)) for t in FIXED},
        "soft over hard, covariance": (SOFT, replace(SOFT, labels="hard")),
        "soft over hard, RFM": (VARIANTS["soft, RFM"], VARIANTS["hard, RFM"]),
        "gating over soft, covariance": (VARIANTS["gating, covariance"], SOFT),
        "gating over true activity, covariance": (
            VARIANTS["gating, covariance"],
            VARIANTS["true activity, covariance"],
        ),
        "gating over soft, RFM": (VARIANTS["gating, RFM"], VARIANTS["soft, RFM"]),
    }
    return {
        "scores": scores(study, VARIANTS),
        "differences": {name: comparison(study, *pair) for name, pair in pairs.items()},
    }


def few_prompts(subject: Subject) -> dict[str, Any]:
    """Soft against hard labels for the covariance from few prompts, where it has no ceiling."""
    named = {name: VARIANTS[name] for name in ("hard, covariance", "soft, covariance")}
    study = _study(subject, "few prompts", named, prompts=subject.scale.few)
    return {
        "scores": scores(study, named),
        "soft over hard, covariance": comparison(study, SOFT, VARIANTS["hard, covariance"]),
        "prompts": subject.scale.few,
    }


def blocks(subject: Subject) -> dict[str, Any]:
    """Steering the four most enriched blocks, four drawn for each concept, and the least ones."""
    named = {blocks: replace(SOFT, blocks=blocks) for blocks in BLOCKS}
    study = _study(subject, "blocks", named)
    return {
        "scores": scores(study, named),
        "top 4 over random 4": comparison(study, named["top4"], named["random4"]),
        "top 4 over bottom 4": comparison(study, named["top4"], named["bottom4"]),
    }
