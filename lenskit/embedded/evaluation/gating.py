"""What attention tells of activity: the gating label, Eq. 4, and which tokens are selected."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from lenskit.capture import Capture
from lenskit.concepts import Concept
from lenskit.embedded.evaluation.subject import Subject, kept, mean
from lenskit.embedded.measures import activity_followed, gating_auroc
from lenskit.labels import displacement_cosine, gating_head, true_activity
from lenskit.selector import select_tokens


def mean_displacement_cosine(captured: Capture) -> float:
    """``displacement_cosine`` by the true activity, mean over blocks."""
    return float(displacement_cosine(captured, true_activity(captured.prompts)).mean())


def _of_concept(subject: Subject, concept: Concept) -> dict[str, Any]:
    captured = subject.capture(concept)
    subject.vectors(concept, captured)
    head = gating_head(captured, seed=subject.seed)
    return {
        "AUROC": gating_auroc(captured),
        "p": head.p_value,
        "head": [head.block, head.head, head.candidate - len(captured.candidates)],
        "soft label followed": activity_followed(captured),
        "displacement cosine": mean_displacement_cosine(captured),
        "tokens": select_tokens(captured).offsets.tolist(),
    }


def gating(subject: Subject) -> dict[str, Any]:
    """Over concepts: AUROC of the gating label for activity, and the tokens that Eq. 3 selects.

    ``gates``: the share of concepts whose gating head's attention falls into two groups (p < .05).
    ``not commonest``: the share of blocks, over all concepts, in which another than the commonest
    token is selected. ``soft label followed``: rank correlation of Eq. 4 with activity at the best
    block.
    """
    rows = [
        kept(subject.file("gating", c), partial(_of_concept, subject, c)) for c in subject.concepts
    ]
    scores = [row["AUROC"] for row in rows]
    tokens = Counter(token for row in rows for token in row["tokens"])
    commonest, times = tokens.most_common(1)[0]
    heads = Counter(tuple(row["head"]) for row in rows).most_common(3)
    return {
        "AUROC": mean(scores),
        "tenth percentile": float(np.quantile(scores, 0.1)),
        "lowest": min(scores),
        "gates": mean([float(row["p"] < 0.05) for row in rows]),
        "soft label followed": mean([row["soft label followed"] for row in rows]),
        "displacement cosine": mean([row["displacement cosine"] for row in rows]),
        "commonest token": commonest,
        "not commonest": 1 - times / tokens.total(),
        "tokens": {str(token): number for token, number in sorted(tokens.items())},
        "heads": [[*head, number] for head, number in heads],
        "n": len(rows),
    }
