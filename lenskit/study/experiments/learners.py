"""Which learner finds the direction, how alike they are, and what the best direction could do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch

from lenskit.concepts import Concept
from lenskit.study.cells import Row
from lenskit.study.clock import seconds_of
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure, made_by
from lenskit.study.experiments.directions import InDirections
from lenskit.study.experiments.optimised import OptimisedVector
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import summary
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.memory import peak_bytes
from lenskit.study.ways import Variant
from lenskit.vectors import LEARNERS, ConceptVectors, RecursiveFeatureMachine, fit_vectors

_OWN = Variant()
DIRECTIONS = (1, 2, 4, 8)
OPTIMISED = "optimised vector, one block"


@dataclass(frozen=True)
class Compared:
    """Seconds and memory of each learner's fit, and cosines between the vectors that they find."""

    ways: tuple[Way, ...]
    learners: Mapping[str, Callable[[], object]]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        rows: list[Row] = []
        for name, learner in self.learners.items():
            fit = partial(fit_vectors, bench.capture, learner=learner(), progress=False)
            try:
                rows += [
                    {"what": "seconds", "way": name, "value": seconds_of(fit, "cpu")},
                    {"what": "MiB", "way": name, "value": peak_bytes(fit) / 2**20},
                ]
            except ValueError:
                continue  # its answers say why it finds nothing
        found: dict[str, ConceptVectors] = {}
        for way in self.ways:
            try:
                made = made_by(way, bench)
            except ValueError:
                continue
            if made is not None:
                found[way.name] = made
        for (one, v), (other, w) in combinations(found.items(), 2):
            cosine = torch.cosine_similarity(v.directions, w.directions, dim=-1)
            known = (v.directions.any(dim=-1) & w.directions.any(dim=-1)).tolist()
            rows += [
                {"what": "cosine", "way": f"{one} and {other}", "block": block, "value": value}
                for block, value in enumerate(cosine.tolist())
                if known[block]
            ]
        return rows


def learners(
    model: Model, concepts: Iterable[Concept] | Concept, *, steps: int = 60, **options: Any
) -> Experiment:
    """Every learner on the default labels and token, in all blocks, and a ceiling.

    The ceiling is a vector of one block (that with the least loss of at most eight) that is
    optimised on the model's own answers to other questions, in ``steps`` steps. Of the Recursive
    Feature Machine each bandwidth and scaling of its grid stands alone too, and the covariance is
    also kept to few principal directions of the rows, which says how many the concept needs. The
    measures "seconds" and "MiB" are of a fit to the captured prompts, all blocks: its time, and the
    most memory that it holds beside them. ``parts["cosines"]``: how alike vectors are, by block.

    ``options`` as in ``tokens``.
    """
    with begun("learners", model, concepts, options) as run:
        ways = [
            Way(name, Fitted(replace(_OWN, learner=name)), columns={"learner": name})
            for name in ("covariance", *(name for name in LEARNERS if name != "covariance"))
        ]
        optimised = OptimisedVector(run.shape.some_blocks, run.setting.judge, steps)
        ceiling = Way(OPTIMISED, optimised, columns={"learner": "optimised"})
        grid = {
            f"rfm, bandwidth {bandwidth:g}, {'scaled' if scaled else 'not scaled'}": partial(
                RecursiveFeatureMachine, bandwidths=(bandwidth,), scalings=(scaled,)
            )
            for bandwidth in (1.0, 10.0, 100.0)
            for scaled in (False, True)
        }
        alone = [
            Way(name, Fitted(_OWN, learner=learner), columns={"learner": "rfm"})
            for name, learner in grid.items()
        ]
        few = {
            f"covariance, in {number} direction{'s' if number > 1 else ''}": partial(
                InDirections, number
            )
            for number in DIRECTIONS
        }
        alone += [
            Way(name, Fitted(_OWN, learner=learner), columns={"learner": "covariance"})
            for name, learner in few.items()
        ]
        measure = Measure("learners compared", Compared((*ways, ceiling), {**LEARNERS, **grid}))
        everything = [*ways, ceiling, *alone, *controls(_OWN, several=run.several)]
        run.prepare(*everything, measure)
        answers, found = run.answers(everything), run.measured(measure)
        spent = found[found["what"].isin(["seconds", "MiB"])]
        spent = spent.pivot_table(
            index=["concept_class", "concept", "way"], columns="what", values="value", sort=False
        )
        cosines = found[found["what"] == "cosine"].rename(columns={"value": "cosine"})
        cosines = cosines.assign(
            way=cosines["way"] + ", block " + cosines["block"].map("{:g}".format)
        )
        return run.scored(
            answers,
            "Which learner finds the direction, and what could the best one do?",
            more=spent.reset_index().rename_axis(columns=None),
            parts={"cosines": summary(cosines, ["cosine"], seed=run.setting.seed)},
        )
