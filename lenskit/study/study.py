"""The table that a study finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch

from lenskit._display import Displayed, count, quoted, spread
from lenskit.scoring import steerability

KEYS = ["token", "labels", "learner", "blocks", "control"]


@dataclass(frozen=True, repr=False)
class Study(Displayed):
    """``answers``: a tidy table with a row for each concept, variant, coefficient and question."""

    answers: pd.DataFrame

    def _headline(self) -> str:
        return f"Study of {count(len(self.answers), 'answer')}"

    def _rows(self) -> dict[str, object]:
        answers = self.answers
        score = answers["score"]
        return {
            "concepts": f"{answers.groupby(['concept_class', 'concept']).ngroups}, of "
            f"{quoted(answers['concept_class'].unique())}",
            "variants": answers.groupby(KEYS).ngroups,
            "controls": quoted(each for each in answers["control"].unique() if each),
            "coefficients": quoted(sorted(answers["coefficient"].unique().tolist())),
            "questions": answers["question"].nunique(),
            "on concept": f"{score.mean():.1%} of the answers; by variant "
            + spread(answers.groupby(KEYS)["score"].mean()),
            "more": ".compare() the variants, .concepts one by one, .answers",
        }

    @cached_property
    def concepts(self) -> pd.DataFrame:
        """A row for each concept and variant: ``best`` and ``held_out`` steerability (0 to 1)."""
        rows = []
        keys = ["concept_class", "concept", *KEYS]
        for key, group in self.answers.groupby(keys, sort=False):
            table = group.pivot_table(index="coefficient", columns="question", values="score")
            scores = torch.tensor(table.to_numpy())
            found = steerability(scores, list(table.index))  # type: ignore[operator]
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
