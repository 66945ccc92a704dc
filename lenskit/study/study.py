"""What a study compares, and the table that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from types import MappingProxyType

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.labels import activity_labels, gating_labels, hard_labels, soft_labels
from lenskit.scoring import steerability
from lenskit.selector import TokenSelection
from lenskit.vectors import (
    Logistic,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
    Ridge,
    SoftCovariance,
)

LEARNERS: Mapping[str, Callable[[], object]] = MappingProxyType(
    {
        "rfm": RecursiveFeatureMachine,
        "ridge": Ridge,
        "logistic": Logistic,
        "covariance": SoftCovariance,
        "mean difference": MeanDifference,
        "pca": PrincipalComponent,
    }
)
Labels = Callable[[Capture, TokenSelection], Float[Tensor, "prompt layer"]]
LABELS: Mapping[str, Labels] = MappingProxyType(
    {
        "soft": soft_labels,
        "hard": hard_labels,
        "gating": gating_labels,
        "true activity": activity_labels,
    }
)
COEFFICIENTS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13)
CONTROLS = ("unsteered", "prompted", "random vector", "shuffled labels")
KEYS = ["token", "labels", "learner", "blocks", "control"]


@dataclass(frozen=True)
class Variant:
    """One way to make a concept vector and to apply it.

    ``token``: "attention" (Eq. 3) or a fixed offset such as "-1". ``labels``: "soft" (Eq. 4),
    "hard", "gating" or "true activity" (of the embedded grammar). ``learner``: a key of the
    study's learners. ``blocks``: "all", "top4", "bottom4", "random4" by enrichment, or block
    numbers such as "4,5,6". ``control``: empty, or one of ``CONTROLS``.
    """

    token: str = "attention"
    labels: str = "soft"
    learner: str = "rfm"
    blocks: str = "all"
    control: str = ""


def variants(
    *,
    tokens: Iterable[str | int] = ("attention",),
    labels: Iterable[str] = ("soft",),
    learners: Iterable[str] = ("rfm",),
    blocks: Iterable[str] = ("all",),
    controls: Iterable[str] = CONTROLS,
) -> tuple[Variant, ...]:
    """Every combination, and the controls of the first one."""
    combined = [
        Variant(str(t), y, name, b) for t, y, name, b in product(tokens, labels, learners, blocks)
    ]
    if not combined:
        raise ValueError("tokens, labels, learners and blocks must each name at least one choice")
    return (*combined, *(replace(combined[0], control=control) for control in controls))


@dataclass(frozen=True)
class Study:
    """``answers``: a tidy table with a row for each concept, variant, coefficient and question."""

    answers: pd.DataFrame

    @cached_property
    def concepts(self) -> pd.DataFrame:
        """A row for each concept and variant: ``best`` and ``held_out`` steerability (0 to 1)."""
        rows = []
        keys = ["concept_class", "concept", *KEYS]
        for key, group in self.answers.groupby(keys, sort=False):
            table = group.pivot_table(index="coefficient", columns="question", values="score")
            found = steerability(torch.tensor(table.to_numpy()), list(table.index))
            rows.append(
                dict(zip(keys, key, strict=True))
                | {
                    "best": found.best,
                    "held_out": found.held_out,
                    "coefficient": table.index[found.coefficient],
                }
            )
        return pd.DataFrame(rows)

    def compare(self, by: Sequence[str] = KEYS) -> pd.DataFrame:
        """Means over concepts with their standard errors, a row for each value of ``by``."""
        groups = self.concepts.groupby(list(by), sort=False)[["best", "held_out"]]
        table = groups.mean().join(groups.sem().add_suffix(" ±"))
        return table.join(groups.size().rename("concepts")).reset_index()
