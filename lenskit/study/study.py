"""The table that a study finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch

from lenskit._display import Displayed, count, quoted, spread
from lenskit.scoring import steerability

KEYS = ["token", "labels", "learner", "blocks", "control"]


@dataclass(frozen=True, repr=False)
class Study(Displayed):
    """``answers``: a tidy table with a row for each concept, variant, coefficient and question.

    ``seconds``: what each stage took of the run that made it, all its workers together; empty where
    everything was there already.
    """

    answers: pd.DataFrame
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def time(self) -> str:
        """Where the time went, the longest stage first; empty for a study that took none."""
        total = sum(self.seconds.values())
        order = sorted(self.seconds.items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {own:.3g} s ({own / total:.0%})" for name, own in order if total)

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
            **({"time": self.time} if self.seconds else {}),
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
