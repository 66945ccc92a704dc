"""The table that a study finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch

from lenskit.scoring import steerability

KEYS = ["token", "labels", "learner", "blocks", "control"]


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
