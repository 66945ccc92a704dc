"""Steering that acts only while it must, beside steering always: the same score for less?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept, question_prompt
from lenskit.feedback import ClosedLoop, Projection, generate_plausible, regulate
from lenskit.generation import generate
from lenskit.scoring import as_verdict, fluency
from lenskit.steering import steer
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, best_for_others, summary
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import sharing
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors

ALWAYS, NOTHING, PROMPTED = "always", "unsteered", "prefix in the prompt"


@dataclass(frozen=True)
class Asked:
    """What is answered under a loop: a question and a coefficient for each row, and the band.

    ``band``: projections on the vector of ``block``, in coefficients: half of what the prefix adds
    to a prompt without it, and all of it.
    """

    model: TransformerBridge
    questions: Sequence[str]
    vectors: ConceptVectors
    coefficients: Sequence[float]
    block: int
    band: tuple[float, float]
    max_new_tokens: int
    batch_size: int

    def steered(self, operation: str = "add") -> Any:
        """The context in which every token is steered."""
        return steer(
            self.model,
            self.vectors,
            coefficient=self.coefficients,
            relative=True,
            operation=operation,
        )

    def answers(self) -> list[str]:
        """Greedy answers under whatever is applied."""
        given = generate(
            self.model,
            self.questions,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return [str(answer) for answer in given]


class Loop(Protocol):
    """Answers, and for each the share of full strength that its passes were steered with."""

    def __call__(self, asked: Asked) -> tuple[list[str], list[float]]: ...


def always(asked: Asked) -> tuple[list[str], list[float]]:
    """No loop."""
    with asked.steered():
        return asked.answers(), [1.0] * len(asked.questions)


def short_positions(asked: Asked) -> tuple[list[str], list[float]]:
    """Each position is brought up to the coefficient where it falls short of it: no state."""
    with asked.steered("raise_to"):
        return asked.answers(), [math.nan] * len(asked.questions)


def thermostat(asked: Asked) -> tuple[list[str], list[float]]:
    """On once the projection is below the band, off once it is above."""
    return _regulated(asked, proportional=False)


def proportional(asked: Asked) -> tuple[list[str], list[float]]:
    """As strong as the projection lies low in the band."""
    return _regulated(asked, proportional=True)


def plausible(asked: Asked) -> tuple[list[str], list[float]]:
    """Weaker where the unsteered model finds the token implausible, after Directer."""
    given = generate_plausible(
        asked.model,
        asked.questions,
        asked.steered(),
        max_new_tokens=asked.max_new_tokens,
        batch_size=asked.batch_size,
    )
    return [str(answer) for answer in given], [_mean(answer.gains) for answer in given]


def _regulated(asked: Asked, *, proportional: bool) -> tuple[list[str], list[float]]:
    low, high = asked.band
    watched = Projection(asked.vectors, asked.block, relative=True)
    loop = ClosedLoop(watched, low=low, high=high, proportional=proportional)
    with regulate(asked.model, loop, asked.steered()) as record:
        answers = asked.answers()
    return answers, [_mean(own) for own in record.gains]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else math.nan


LOOPS: Mapping[str, Loop] = MappingProxyType(
    {
        ALWAYS: always,
        "below the band": thermostat,
        "in proportion": proportional,
        "positions that fall short": short_positions,
        "where plausible": plausible,
    }
)


@dataclass(frozen=True)
class Looped:
    """Score, fluency and strength of every loop at every coefficient, and of the controls."""

    loops: tuple[str, ...]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        vectors = bench.steering(Variant())
        if vectors is None:
            return []
        block = int(vectors.validation.argmax())
        band, concept, model = _band(bench, vectors, block), bench.concept, bench.model
        questions = list(concept.questions)

        def said(name: str, rows: Asked, found: tuple[list[str], list[float]]) -> list[Row]:
            texts, strengths = found
            prefixes, size = [concept.prefix] * len(texts), setting.batch_size
            told = fluency(
                model, rows.questions, texts, prefixes=prefixes, batch_size=size
            ).tolist()
            return [
                {
                    **{"way": name, "coefficient": totals[own], "strength": strength},
                    **{"score": as_verdict(setting.judge(concept, question, text)).score},
                    **{"nats": nats},
                }
                for own, strength, question, text, nats in zip(
                    rows.coefficients, strengths, rows.questions, texts, told, strict=True
                )
            ]

        shared = sharing(vectors)
        totals = {total / shared: total for total in (0.0, *setting.coefficients)}
        number, limit = len(questions), setting.max_new_tokens
        still, size = [0.0] * number, setting.batch_size
        bare = Asked(model, questions, vectors, still, block, band, limit, size)
        prompts = [question_prompt(question, concept.prefix) for question in questions]
        prefixed = replace(bare, questions=prompts).answers()
        rows = said(NOTHING, bare, (bare.answers(), still))
        rows += said(PROMPTED, bare, (prefixed, still))
        grid = replace(
            bare,
            questions=questions * len(setting.coefficients),
            coefficients=[own for own in list(totals)[1:] for _ in questions],
        )
        for name in self.loops:
            rows += said(name, grid, LOOPS[name](grid))
        means = pd.DataFrame(rows).groupby(["way", "coefficient"], sort=False).mean().reset_index()
        base = float(means.loc[means["way"] == PROMPTED, "nats"].iloc[0])
        means = means.assign(**{"less fluent": means["nats"] - base}).drop(columns="nats")
        return [
            {key: None if value != value else value for key, value in row.items()}
            for row in means.to_dict("records")
        ]


def loop(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    loops: Sequence[str] = tuple(LOOPS),
    **options: Any,
) -> Experiment:
    """Closed loops beside steering always, by the default vectors: score, fluency and strength.

    A loop steers while the projection on the vector of the block with the best validation is out
    of its band; in proportion to how far it is; at the positions that fall short; or where the
    unsteered model finds the token plausible. Each has every coefficient of the budget, and is
    shown at the one that scores best on all *other* concepts. "less fluent": by how many nats a
    token its answers are less likely than the prompted ones, for the unsteered model that reads the
    prefix. "strength": the mean share of the coefficient. ``parts["by coefficient"]`` has all.

    ``options`` as in ``tokens``. ValueError for a single concept, and for unknown ``loops``.
    """
    if unknown := sorted(set(loops) - set(LOOPS)):
        raise ValueError(f"loops {unknown} are not known; there are {', '.join(LOOPS)}")
    with begun("loop", model, concepts, options) as run:
        if not run.several:
            raise ValueError("coefficients are chosen on other concepts, so give two or more")
        rows = run.measured(Measure("loops", Looped(tuple(loops))))
        rows = rows.astype({name: float for name in ("score", "less fluent", "strength")})
        measures = ["score", "less fluent", "strength"]
        found = pd.concat(
            [_elsewhere(own) for _, own in rows.groupby("way", sort=False)], ignore_index=True
        )
        order = {name: place for place, name in enumerate((*loops, NOTHING, PROMPTED))}
        found = found.sort_values("way", key=lambda names: names.map(order), kind="stable")
        means = rows.groupby(["way", "coefficient"], sort=False)[measures].mean().reset_index()
        return run.result(
            summary(found, measures, reference=loops[0], seed=run.setting.seed),
            "Does steering only while it is needed cost less?",
            reference=loops[0],
            parts={"by coefficient": means, "by concept": found},
            notes=["The coefficient of each concept is the best one of all other concepts."],
        )


def _elsewhere(rows: pd.DataFrame) -> pd.DataFrame:
    """Each concept's row at the coefficient that scores best on all others, the first of equals."""
    scores = rows.pivot_table(index=CONCEPT, columns="coefficient", values="score", sort=False)
    chosen = best_for_others(scores)
    keys = list(zip(rows["concept_class"], rows["concept"], strict=True))
    best = [chosen[key] for key in keys]
    return rows[rows["coefficient"].to_numpy() == best]


def _band(bench: Bench, vectors: ConceptVectors, block: int) -> tuple[float, float]:
    """Half of what the prefix adds to the projection at the selected token, and all of it."""
    stream = bench.selection("attention").take(bench.capture.resid_post)[:, block].double()
    added = vectors.directions[block].double() * float(vectors.resid_norm[block])
    reading = stream @ added / added.square().sum()
    prefixed = bench.capture.prompts.has_prefix
    without, high = float(reading[~prefixed].mean()), float(reading[prefixed].mean())
    return (without + high) / 2, high
