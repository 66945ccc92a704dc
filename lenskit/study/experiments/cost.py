"""What quality costs: prompts, forward passes and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lenskit.capture import capture
from lenskit.concepts import Concept
from lenskit.prompts import build_prompts
from lenskit.study.cells import Row
from lenskit.study.clock import seconds_of
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure, quietly
from lenskit.study.experiments.labels import NUMBERS
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.setting import Setting, given
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant

RECIPES = {
    "covariance": Variant(),
    "covariance, hard labels": Variant(labels="hard"),
    "ridge": Variant(learner="ridge"),
    "rfm": Variant(learner="rfm"),
    "each closing token, covariance": Variant("each"),
}


@dataclass(frozen=True)
class Spent:
    """Seconds and forward passes of each way: of the capture, and of the fit behind it."""

    ways: tuple[Way, ...]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        device = bench.model.cfg.device
        captured: dict[int, float] = {}
        rows: list[Row] = []
        for way in self.ways:
            number = way.columns["prompts"]
            make = way.make
            assert isinstance(make, Fitted)
            if number not in captured:
                captured[number] = seconds_of(partial(_capture, bench, number), device)
            # Benches keep what they fit, so that a fit is timed on one that has none.
            few = bench.few(number).fresh()
            try:
                fit = seconds_of(partial(quietly, few.steering, make.variant), device)
            except ValueError:
                continue  # its answers say why there is nothing
            rows.append(
                {"way": way.name, "seconds": captured[number] + fit, "seconds of the fit": fit}
                | {"forward passes": number}
            )
        return rows


def cost(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    numbers: Sequence[int] = NUMBERS,
    **options: Any,
) -> Experiment:
    """Recipes by the number of prompts: scores, forward passes and seconds of a concept's vectors.

    "forward passes": one for each prompt; "seconds": of prompts, capture and fit in all blocks, on
    this machine, so that they compare recipes and no machines. Answers and their judge, which every
    recipe needs alike to choose a coefficient, are left out.

    ``options`` as in ``tokens``; ``prompts`` are 400 by default.
    """
    options = given(options, prompts=max(numbers))
    with begun("cost", model, concepts, options) as run:
        most = run.setting.prompts
        counts = sorted({min(number, most) for number in numbers} | {most}, reverse=True)
        ways = [
            Way(
                f"{name}, {number} prompts",
                Fitted(variant, number),
                columns={"recipe": name, "prompts": number},
            )
            for number in counts
            for name, variant in RECIPES.items()
        ]
        measure = Measure("what was spent", Spent(tuple(ways)))
        everything = [*ways, *controls(RECIPES["covariance"], several=run.several)]
        run.prepare(*everything, measure)
        answers, spent = run.answers(everything), run.measured(measure)
        return run.scored(
            answers, "What does quality cost?", more=spent, parts={"what was spent": spent}
        )


def _capture(bench: Bench, number: int) -> None:
    prompts = build_prompts(
        bench.model, bench.concept, number=number, statements=bench.statements, seed=bench.seed
    )
    capture(bench.model, prompts, progress=False)
