"""What steers: tokens, labels and learners on many concepts, with controls and paired intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.embedded.evaluation.subject import Subject
from lenskit.labels import hard_labels
from lenskit.selector import TokenSelection
from lenskit.study import LABELS, Study, Variant, paired_differences, run_study

SOFT = Variant("attention", "soft", "covariance")
KINDS = ("hard", "soft", "gating", "true activity")
FIXED = ("-1", "-2", "-3", "-4", "-5")
BLOCKS = ("top4", "random4", "bottom4")


def _seed(capture: Capture) -> int:
    """A concept's own seed, so that concepts do not share their draws."""
    return crc32(capture.prompts.concept.prefix.encode())


def balanced_shuffle(capture: Capture, tokens: TokenSelection) -> Float[Tensor, "prompt layer"]:
    """Labels of 0 and 1 without any information: half of the prompts with the prefix get a 1, and
    half of those without."""
    generator = torch.Generator().manual_seed(_seed(capture))
    label = torch.zeros(len(capture))
    for group in (capture.prompts.has_prefix, ~capture.prompts.has_prefix):
        rows = group.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        label[rows[: len(rows) // 2]] = 1
    return label[:, None].expand(-1, capture.layers).clone()


def plain_shuffle(capture: Capture, tokens: TokenSelection) -> Float[Tensor, "prompt layer"]:
    """Hard labels in another order: by chance more of the 1s fall on either kind of prompt."""
    generator = torch.Generator().manual_seed(_seed(capture))
    return hard_labels(capture)[torch.randperm(len(capture), generator=generator)]


SHUFFLED = {"balanced shuffle": balanced_shuffle, "plain shuffle": plain_shuffle}
VARIANTS: Mapping[str, Variant] = {
    **{f"{kind}, covariance": replace(SOFT, labels=kind) for kind in KINDS},
    **{f"{kind}, RFM": replace(SOFT, labels=kind, learner="rfm") for kind in KINDS},
    **{f"token {token}, soft, covariance": replace(SOFT, token=token) for token in FIXED},
    **{name: replace(SOFT, labels=name) for name in SHUFFLED},
    "prompted": replace(SOFT, control="prompted"),
}


def comparison(study: Study, better: Variant, than: Variant) -> dict[str, dict[str, float]]:
    """By ``best`` and ``held_out``: the paired difference over concepts, its interval, n."""
    found = {}
    for score in ("best", "held_out"):
        table = paired_differences(study, than, score=score)
        row = table[
            (table[["token", "labels", "learner", "blocks", "control"]] == astuple(better)).all(1)
        ].iloc[0]
        found[score] = {
            "mean": float(row["difference"]),
            "low": float(row["low"]),
            "high": float(row["high"]),
            "n": int(row["concepts"]),
        }
    return found


def scores(study: Study, named: Mapping[str, Variant]) -> dict[str, dict[str, float]]:
    """For each variant the means over concepts: best, held out, and the best one coefficient."""
    keys = ["token", "labels", "learner", "blocks", "control"]
    table = study.compare().set_index(keys)
    single = study.answers.groupby([*keys, "coefficient"])["score"].mean().groupby(keys).max()
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
        "labels": LABELS | SHUFFLED,
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
