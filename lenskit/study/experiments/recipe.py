"""The recipe that looks first, beside the others and without each of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lenskit.concepts import Concept
from lenskit.generation import generate_steered
from lenskit.recipes import INCREMENTS, Recipe, recipes
from lenskit.scoring import fluency
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure, made_by, steering_row
from lenskit.study.experiments.extraction import NEUTRAL, NeutralNegative
from lenskit.study.experiments.looked import look_of
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, by_concept, summary
from lenskit.study.experiments.setting import Setting, given
from lenskit.study.experiments.ways import Fitted, Way, controls, sharing
from lenskit.study.look import Look
from lenskit.study.ways import CONTROLS, Variant, variant_of

OWN = "lenskit"
FEW = 16
# Those of a look are among them.
COEFFICIENTS = (0.15, 0.3, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Fluency:
    """Nats a token of answers, for the unsteered model that reads the prefix, over the prompted's.

    ``coefficients``: of each way, shared by its blocks as those of the experiment are.
    """

    ways: tuple[Way, ...]
    coefficients: tuple[float, ...]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        concept = bench.concept
        names, rows = [], []
        for way, coefficient in zip(self.ways, self.coefficients, strict=True):
            try:
                vectors = made_by(way, bench)
            except ValueError:
                continue  # its answers say why there is nothing
            shared = 1 if vectors is None else sharing(vectors)
            names.append(way.name)
            rows += [
                steering_row(way, concept, question, vectors, coefficient / shared)
                for question in concept.questions
            ]
        answers = generate_steered(
            bench.model,
            rows,
            relative=True,
            max_new_tokens=setting.max_new_tokens,
            batch_size=setting.batch_size,
        )
        told = fluency(
            bench.model,
            [str(row.question) for row in rows],
            answers,
            prefixes=[concept.prefix] * len(rows),
            batch_size=setting.batch_size,
        )
        mean = dict(zip(names, told.view(len(names), -1).nanmean(dim=1).tolist(), strict=True))
        base = mean["prefix in the prompt"]
        return [
            {"way": name, "less fluent": value - base if math.isfinite(value - base) else None}
            for name, value in mean.items()
        ]


def recipe(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    few: int = FEW,
    **options: Any,
) -> Experiment:
    """The recipe "lenskit" beside "paper" and "default", and with one part of it removed at a time.

    Every other concept of a class is searched, and nothing but these decides: by a look at them
    token, blocks and coefficient are settled; of the other recipes the one coefficient is that of
    their best scores. The table is of the rest. "fixed coefficient": the score at that one.
    "less fluent": by how many nats a token the answers there are less likely than the prompted
    ones, for the unsteered model that reads the prefix. Removed are: labels by divergence, own
    vectors of the closing tokens, the look (the middle block instead), their lengths, and
    increments where these were chosen; ``few``: prompts instead of all. Tried in its place are
    whitening (ridge), a neutral prefix in the negative prompts, addition that keeps the stream's
    norm, and addition only where the answer is written from. ``parts``: "look", what was
    looked at, and "searched", the scores of the searched half.

    ``options`` as in ``tokens``; ``coefficients`` are in displacements where a way has these, and
    then not shared by its blocks. ValueError for a single concept.
    """
    options = given(options, coefficients=COEFFICIENTS)
    with begun("recipe", model, concepts, options) as run:
        if not run.several:
            raise ValueError("one half of the concepts is searched, so give two concepts or more")
        search, report = (replace(run, concepts=half) for half in halves(run.concepts))
        found = look_of(search, recipes["lenskit"])
        middle = str(run.shape.blocks // 2)
        ways = [*_ways(found, middle, min(few, run.setting.prompts))]
        own = variant_of(found.recipe)
        beside = controls(own, several=True, recipe=found.recipe)
        everything = [*ways, *beside]
        searched = by_concept(search.answers(everything))
        fixed = _fixed(search.answers(everything), everything, found.recipe)
        answers = report.answers(everything)
        measure = Measure("fluency", Fluency(tuple(everything), tuple(fixed.values())))
        more = report.measured(measure).astype({"less fluent": float})
        more = _at(answers, fixed).merge(more, on=[*CONCEPT, "way"], how="outer")
        return report.scored(
            answers,
            "Which recipe finds what steers, and which of its parts matter?",
            more=more,
            parts={
                "look": found.table,
                "searched": summary(
                    searched, ["best", "held out"], reference=OWN, seed=run.setting.seed
                ),
            },
            notes=[
                f"Searched on {len(search.concepts)} other concepts. Looked: {found.why}; "
                f"coefficient {found.recipe.coefficient:g}. Lenskit's coefficients are in "
                "displacements. No part of the recipe needs the truth; the fixed coefficients of "
                "the other ways, which are best on the searched half, do."
            ],
        )


def halves(concepts: Sequence[Concept]) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Every other concept of each class, and the rest; classes take turns in who begins."""
    by_class: dict[str | None, list[Concept]] = {}
    for concept in concepts:
        by_class.setdefault(concept.concept_class, []).append(concept)
    parts: tuple[list[Concept], list[Concept]] = ([], [])
    for place, own in enumerate(by_class.values()):
        for i, concept in enumerate(own):
            parts[(place + i) % 2].append(concept)
    return tuple(parts[0]), tuple(parts[1])


def _ways(found: Look, middle: str, few: int) -> Iterable[Way]:
    """The recipes, and the settled one with one part removed at a time."""
    chosen = found.recipe
    own = variant_of(chosen)

    def columns(variant: Variant, of: Recipe = chosen) -> dict[str, str]:
        told = {"recipe": of.name, "token": variant.token, "labels": variant.labels}
        return told | {"learner": variant.learner, "blocks": variant.blocks}

    def made(name: str, variant: Variant, of: Recipe = chosen, **more: Any) -> Way:
        return Way(name, Fitted(variant, recipe=of, **more), columns=columns(variant, of))

    yield made(OWN, own)
    for name in ("paper", "default"):
        yield made(name, variant_of(recipes[name]), recipes[name])
    yield made(f"{OWN}, a look at each concept", replace(own, token="look", blocks="look"))
    for labels in ("hard", "gating or hard"):
        yield made(f"{OWN}, {labels} labels", replace(own, labels=labels))
    best = found.table.sort_values("left", kind="stable").drop_duplicates("token")
    places = dict(zip(best["token"], best["blocks"], strict=True))
    if own.token != "attention" and "attention" in places:
        other = replace(own, token="attention", blocks=places["attention"])
        yield made(f"{OWN}, token by attention", other)
    if own.blocks == INCREMENTS:
        alone = found.table[(found.table["token"] == own.token)]
        alone = alone[alone["blocks"] != INCREMENTS]
        block = alone.loc[alone["left"].idxmin(), "blocks"]
        yield made(f"{OWN}, one block", replace(own, blocks=str(block)))
        yield made(f"{OWN}, no increments", replace(own, blocks="all"))
    yield made(f"{OWN}, the middle block", replace(own, blocks=middle))
    yield made(f"{OWN}, equal lengths", own, lengths=False)
    # For hard labels it is the difference of the means, whitened.
    yield made(f"{OWN}, ridge", replace(own, learner="ridge"))
    hard = replace(own, labels="hard")
    neutral = NeutralNegative(NEUTRAL, hard, chosen)
    yield Way(f"{OWN}, neutral prefix as negative", neutral, columns=columns(hard))
    yield replace(made(f"{OWN}, norms kept", own), operation="add_keeping_norm")
    yield replace(made(f"{OWN}, where the answer is written", own), positions="answer")
    yield made(f"{OWN}, {few} prompts", own, prompts=few)


def _fixed(answers: pd.DataFrame, ways: Sequence[Way], own: Recipe) -> dict[str, float]:
    """The one coefficient of each way, 0 without any: for the recipe's own that of the look, for
    others the one of the best mean score over all concepts."""
    grid = answers[answers["score"].notna() & ~answers["calibrated"].astype(bool)]
    means = grid.groupby(["way", "coefficient"])["score"].mean()
    found = {}
    for way in ways:
        looked = way.columns.get("recipe") == own.name or way.control in CONTROLS[2:]
        if way.name not in means.index:
            found[way.name] = 0.0
        elif looked and own.coefficient in means[way.name].index:
            found[way.name] = float(own.coefficient or 0.0)
        else:
            found[way.name] = float(means[way.name].idxmax())
    return found


def _at(answers: pd.DataFrame, fixed: dict[str, float]) -> pd.DataFrame:
    """The mean score of each concept and way at its fixed coefficient."""
    same = answers["coefficient"] == answers["way"].map(fixed)
    grid = ~answers["calibrated"].astype(bool) | (answers["coefficient"] == 0)
    own = answers[same & grid & answers["score"].notna()]
    return (
        own.groupby([*CONCEPT, "way"], sort=False)["score"]
        .mean()
        .rename("fixed coefficient")
        .reset_index()
    )
