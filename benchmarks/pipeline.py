"""One concept from prompts to steered answers, against the procedure as published.

    python -m benchmarks.pipeline --shape embedded

Both capture the same prompts, select a token for each block, fit a Recursive Feature Machine on
every block and answer the concept's five questions at eight coefficients, 50 tokens each, none of
which ends before. benchmarks/plain.py says what «as published» is; ``--share`` runs a part of it
and scales its time up. The estimate is that of ``lenskit plan``, made before.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated

import typer

from benchmarks import measure
from benchmarks.generation import endless
from benchmarks.plain import COEFFICIENTS, MAX_NEW_TOKENS, plain_seconds
from lenskit.capture import Capture, capture
from lenskit.concepts import Concept, concepts
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import soft_labels
from lenskit.prompts import PromptSet, build_prompts
from lenskit.selector import select_tokens
from lenskit.study.plan import Plan, plan
from lenskit.vectors import ConceptVectors, RecursiveFeatureMachine, fit_vectors

TARGET = 10


@dataclass
class Work:
    """The pipeline of one concept, a method for each part; each uses what the last one left."""

    pair: measure.Pair
    concept: Concept
    prompts: PromptSet
    learner: RecursiveFeatureMachine
    captured: Capture | None = None
    vectors: ConceptVectors | None = None

    def capture(self) -> None:
        """Attention and residual stream of all prompts."""
        self.captured = capture(self.pair.model, self.prompts, progress=False)

    def fit(self) -> None:
        """Tokens, labels, and a vector for each block."""
        tokens = select_tokens(self.captured)
        labels = soft_labels(self.captured, tokens, constant="hard")
        self.vectors = fit_vectors(
            self.captured, tokens, labels, learner=self.learner, progress=False
        )

    def generation(self) -> None:
        """All answers in one batch."""
        rows = [
            SteeringRow(question, self.vectors, coefficient)
            for coefficient, question in product(COEFFICIENTS, self.concept.questions)
        ]
        with endless(self.pair.model):
            generate_steered(self.pair.model, rows, relative=False, max_new_tokens=MAX_NEW_TOKENS)

    def parts(self) -> dict:
        """What is timed, in order."""
        return {"capture": self.capture, "fit": self.fit, "generation": self.generation}


def run(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    prompts: Annotated[int, typer.Option(help="Prompts of the concept.")] = 400,
    share: Annotated[float, typer.Option(help="Of the published procedure to run.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 3,
) -> list[measure.Report]:
    """The seconds of each part, and their ratios."""
    pair = measure.load(shape, device, dtype)
    share, repeats = (min(share, 0.1), 1) if quick else (share, repeats)
    concept = concepts["fears"]["spiders"]
    made = build_prompts(pair.model, concept, number=prompts)
    # As in the demonstration: near ties are decided in float64 all the same.
    learner = RecursiveFeatureMachine(dtype="float32", device=None if device == "cpu" else device)
    rows = len(COEFFICIENTS) * len(concept.questions)
    estimate = plan(
        pair.model, 1, prompts, rows=rows, max_new_tokens=MAX_NEW_TOKENS, learner=learner
    )
    taken = measure.medians(Work(pair, concept, made, learner).parts(), pair.device, repeats)
    return [table(pair, taken, plain_seconds(pair, concept, made, share), estimate)]


def table(
    pair: measure.Pair, taken: dict[str, float], plain: dict[str, float], estimate: Plan
) -> measure.Report:
    """Seconds of each part and of the whole, both ways."""
    report = measure.Report(
        f"One concept, {pair.name}, {estimate.prompts} prompts, {estimate.rows} answers",
        ("part", "seconds", "as published, s", "ratio", "target", "lenskit plan, s"),
        note=f"d_model is {pair.plain.config.hidden_size}. What the fit saves grows with it: there "
        "is nothing to save where it is no greater than the number of prompts that train. The "
        "target is for 4096.",
    )
    planned = {name: getattr(estimate, f"{name}_seconds") for name in taken}
    for name in (*taken, "all"):
        ours, theirs, guess = (
            sum(found.values()) if name == "all" else found[name]
            for found in (taken, plain, planned)
        )
        target = f">= {TARGET}" if name == "all" else ""
        report.add(name, ours, theirs, theirs / ours, target, guess)
    return report


if __name__ == "__main__":
    measure.command(run)
