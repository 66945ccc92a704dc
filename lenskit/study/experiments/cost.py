"""What quality costs: prompts, forward passes and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lenskit._display import count
from lenskit.capture import capture
from lenskit.concepts import Concept
from lenskit.prompts import build_prompts
from lenskit.recipes import Recipe, recipes
from lenskit.study.cells import Row
from lenskit.study.clock import seconds_of
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure, quietly
from lenskit.study.experiments.labels import NUMBERS
from lenskit.study.experiments.looked import look_of
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.setting import Setting, given
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant, variant_of

LOOKED = 5
_DEFAULT = Variant()
_OF_THE_DEFAULT = {
    "covariance": _DEFAULT,
    "covariance, hard labels": replace(_DEFAULT, labels="hard"),
    "ridge": replace(_DEFAULT, learner="ridge"),
    "each closing token, covariance": replace(_DEFAULT, token="each"),
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
            few = bench.of(make.recipe).few(number).fresh()
            try:
                fit = seconds_of(partial(quietly, few.steering, make.variant), device)
            except ValueError:
                continue  # its answers say why there is nothing
            rows.append(
                {"way": way.name, "seconds": captured[number] + fit, "seconds of the fit": fit}
                | {"forward passes": number + _passes_of_labels(make.variant, few)}
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

    The recipes "paper" and "lenskit" by their names, and the default one with other labels,
    learners and tokens. "forward passes": one for each prompt, and for labels by divergence two for
    each with the prefix; "seconds": of prompts, capture, labels and fit in all blocks, on this
    machine, so that they compare recipes and no machines. Left out are answers and their judge,
    which every recipe needs alike to choose a coefficient, and lenskit's look: one for the model,
    at a few of the concepts, which settles the recipe for all and knows no truth.

    ``options`` as in ``tokens``; ``prompts`` are 400 by default.
    """
    options = given(options, prompts=max(numbers))
    with begun("cost", model, concepts, options) as run:
        most = run.setting.prompts
        counts = sorted({min(number, most) for number in numbers} | {most}, reverse=True)
        some = run.concepts[:: -(-len(run.concepts) // LOOKED)]
        found = look_of(replace(run, concepts=some), recipes["lenskit"])
        ways = [
            Way(
                f"{name}, {number} prompts",
                Fitted(variant, number, recipe=recipe),
                columns={"recipe": name, "prompts": number},
            )
            for number in counts
            for name, variant, recipe in _recipes(found.recipe)
        ]
        measure = Measure("what was spent", Spent(tuple(ways)))
        everything = [*ways, *controls(_DEFAULT, several=run.several)]
        run.prepare(*everything, measure)
        answers, spent = run.answers(everything), run.measured(measure)
        return run.scored(
            answers,
            "What does quality cost?",
            more=spent,
            parts={"what was spent": spent},
            notes=[
                f"Looked at {count(len(some), 'concept')}: {found.why}. Lenskit's coefficients are "
                "in displacements."
            ],
        )


def _recipes(looked: Recipe) -> Iterator[tuple[str, Variant, Recipe | None]]:
    """Name, variant and recipe; ``None`` for that of the experiment."""
    for name, variant in _OF_THE_DEFAULT.items():
        yield name, variant, None
    for recipe in (recipes["paper"], looked):
        yield recipe.name, variant_of(recipe), recipe


def _passes_of_labels(variant: Variant, bench: Bench) -> int:
    """Prompts that are run for the labels alone: each with the prefix, and the same without it."""
    prefixed = int(bench.capture.prompts.has_prefix.sum())
    return 2 * prefixed if variant.labels == "divergence" else 0


def _capture(bench: Bench, number: int) -> None:
    prompts = build_prompts(
        bench.model, bench.concept, number=number, statements=bench.statements, seed=bench.seed
    )
    capture(bench.model, prompts, progress=False)
