"""A look at concepts of an experiment, which settles a recipe for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lenskit.recipes import Recipe
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.run import Run
from lenskit.study.experiments.scores import CONCEPT
from lenskit.study.experiments.setting import Setting
from lenskit.study.look import Look, looked_at, settled


@dataclass(frozen=True)
class Looked:
    """What each way to add the concept leaves of the divergence from the prefixed model."""

    recipe: Recipe

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        table = looked_at(
            bench.model,
            bench.of(self.recipe).capture,
            self.recipe,
            batch_size=setting.batch_size,
            seed=setting.seed,
        )
        return [
            row | {"divergence": row["divergence"] if math.isfinite(row["divergence"]) else None}
            for row in table.to_dict("records")
        ]


def look_of(run: Run, recipe: Recipe) -> Look:
    """What the concepts of this run settle: no judge and no answer to a test question is asked."""
    rows = run.measured(Measure("look", Looked(recipe)))
    tables = [own for _, own in rows.groupby(CONCEPT, sort=False)]
    names = rows["concept"].drop_duplicates().tolist()
    return settled(recipe, [table.astype({"divergence": float}) for table in tables], names)
