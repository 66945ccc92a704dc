"""The cells of an experiment: a concept's answers under one way to steer, or a measurement."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.generation import SteeringRow
from lenskit.study.answers import answered, judged
from lenskit.study.calibration import Calibration, calibrate
from lenskit.study.cells import Key, Row
from lenskit.study.divergence import unsteered
from lenskit.study.engine import Failure, Results, failure
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import ANOTHER, Way, sharing, steered_blocks
from lenskit.study.identity import identity
from lenskit.vectors import LEARNERS, ConceptVectors


@dataclass(frozen=True)
class Measure:
    """Something measured of a concept: rows, from its bench and what the experiment shares."""

    name: str
    work: Callable[[Bench, Setting], Sequence[Row]]


Task = Way | Measure


@dataclass(frozen=True)
class Cell:
    """A concept, what is computed of it, and the concept whose vectors are a control."""

    concept: Concept
    other: Concept | None
    task: Task


def cell_key(cell: Cell) -> Key:
    """A key that differs where the concept or the task does."""
    concept, other = cell.concept, cell.other
    told: list[Any] = [concept.concept_class, concept.name, concept.prefix, *concept.questions]
    if getattr(cell.task, "control", "") == ANOTHER and other is not None:
        told.append([other.concept_class, other.name, other.prefix])
    text = json.dumps([told, identity(cell.task)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (concept.concept_class or "custom", concept.name, cell.task.name, digest)


def compute(setting: Setting, model: TransformerBridge, group: Mapping[Key, Cell]) -> Results:
    """The rows of each cell, all of one concept, or why there are none.

    The ways share prompts, capture, fits and the batches of answers. One whose vectors cannot be
    made has a row that says why.
    """
    first = next(iter(group.values()))
    bench = _bench(setting, model, first.concept, first.other)
    ways = {key: cell.task for key, cell in group.items() if isinstance(cell.task, Way)}
    found: dict[Key, Sequence[Row] | Failure] = dict(_answers(bench, ways, setting)) if ways else {}
    for key, cell in group.items():
        if isinstance(cell.task, Measure):
            try:
                found[key] = list(cell.task.work(bench, setting))
            except Exception as error:
                found[key] = failure(error)
    return found


def _bench(
    setting: Setting, model: TransformerBridge, concept: Concept, other: Concept | None
) -> Bench:
    def of(one: Concept, beside: Bench | None = None) -> Bench:
        return Bench(
            model,
            one,
            setting.prompts,
            setting.seed,
            LEARNERS,
            setting.recipe,
            setting.statements,
            beside,
        )

    return of(concept, None if other is None else of(other))


def _answers(
    bench: Bench, ways: Mapping[Key, Way], setting: Setting
) -> dict[Key, Sequence[Row] | Failure]:
    """Answers of every way at every coefficient of the budget, and at the one calibrated."""
    found: dict[Key, Sequence[Row] | Failure] = {}
    vectors: dict[Key, ConceptVectors] = {}
    about = {
        "concept_class": bench.concept.concept_class or "custom",
        "concept": bench.concept.name,
    }
    for key, way in ways.items():
        if way.make is None:
            continue
        try:
            made = made_by(way, bench)
            if made is None or not steered_blocks(made):
                raise ValueError("its vectors are zero in every block")
            vectors[key] = made
        except ValueError as error:
            # The method has no answer here, which is a result; anything else is a fault.
            found[key] = [about | _failed(way, str(error))]
        except Exception as error:
            found[key] = failure(error)
    calibrated = _calibrated(bench, {key: ways[key] for key in vectors}, vectors, setting)
    totals = {
        key: _totals(way, vectors.get(key), calibrated.get(key), setting)
        for key, way in ways.items()
        if key not in found
    }
    planned = {key: _rows(bench, ways[key], vectors.get(key), own) for key, own in totals.items()}
    if not planned:
        return found
    texts = answered(
        bench.model,
        planned,
        relative=True,
        max_new_tokens=setting.max_new_tokens,
        batch_size=setting.batch_size,
    )
    for key, rows in planned.items():
        said = texts[key]
        if isinstance(said, Failure):
            found[key] = said
            continue
        try:
            verdicts = judged(bench.concept, rows, said, setting.judge)
        except Exception as error:
            found[key] = failure(error)
            continue
        reached = calibrated[key].divergence if key in calibrated else None
        reached = reached if abs(ways[key].factor) == 1 else None
        found[key] = [
            about | _of(ways[key]) | answer | {"coefficient": total} | _budget(own, reached)
            for (total, own), (_, answer) in zip(
                ((each, own) for each, own in totals[key] for _ in bench.concept.questions),
                verdicts,
                strict=True,
            )
        ]
    return found


def calibrated(
    bench: Bench, ways: Sequence[Way], setting: Setting
) -> Iterator[tuple[Way, ConceptVectors | None, float]]:
    """Each way with its vectors and the coefficient, as ``steer`` takes it, that is calibrated.

    Ways without vectors have the coefficient 0; those that cannot be made, or that reach the
    target at no coefficient, are left out. A way's own ``factor`` is not in it.
    """
    made: dict[Key, tuple[Way, ConceptVectors]] = {}
    for way in ways:
        if way.make is None:
            yield way, None, 0.0
            continue
        try:
            vectors = made_by(way, bench)
        except ValueError:
            continue
        if vectors is not None and steered_blocks(vectors):
            made[(way.name,)] = way, vectors
    missing = {key: own for key, own in made.items() if key[0] not in bench.coefficients}
    own_ways = {key: way for key, (way, _) in missing.items()}
    _calibrated(bench, own_ways, {key: v for key, (_, v) in missing.items()}, setting)
    for key, (way, vectors) in made.items():
        if math.isfinite(bench.coefficients[key[0]]):
            yield way, vectors, bench.coefficients[key[0]]


def _calibrated(
    bench: Bench, ways: Mapping[Key, Way], vectors: Mapping[Key, ConceptVectors], setting: Setting
) -> dict[Key, Calibration]:
    """The coefficient of each way that reaches the target, as ``steer`` takes it."""
    if not vectors:
        return {}
    base = unsteered(bench.model, setting.questions, batch_size=setting.batch_size)
    found = calibrate(
        bench.model,
        [one if ways[key].factor > 0 else -one for key, one in vectors.items()],
        base,
        target=setting.target,
        positions=[ways[key].positions for key in vectors],
        operations=[ways[key].operation for key in vectors],
        relative=True,
        batch_size=max(1, setting.batch_size // 4),
    )
    for key, one in zip(vectors, found, strict=True):
        bench.coefficients[ways[key].name] = one.coefficient
    return dict(zip(vectors, found, strict=True))


def _totals(
    way: Way, vectors: ConceptVectors | None, calibrated: Calibration | None, setting: Setting
) -> list[tuple[float, bool]]:
    """The coefficients that are tried, of all blocks together, and whether one is calibrated."""
    if vectors is None:
        return [(0.0, True)]
    found = [(way.factor * total, False) for total in setting.coefficients]
    if calibrated is not None and calibrated.reached:
        found.append((way.factor * calibrated.coefficient * sharing(vectors), True))
    return found


def _rows(
    bench: Bench,
    way: Way,
    vectors: ConceptVectors | None,
    totals: Sequence[tuple[float, bool]],
) -> list[SteeringRow]:
    concept = bench.concept
    blocks = 1 if vectors is None else sharing(vectors)
    return [
        steering_row(way, concept, question, vectors, total / blocks)
        for (total, _), question in product(totals, concept.questions)
    ]


def steering_row(
    way: Way, concept: Concept, question: str, vectors: ConceptVectors | None, coefficient: float
) -> SteeringRow:
    """A question as the way asks and steers it."""
    return SteeringRow(
        question,
        vectors,
        coefficient,
        concept.prefix if way.prefixed else "",
        operation=way.operation,
        positions=way.positions,
    )


def _budget(calibrated: bool, reached: float | None) -> Row:
    return {"calibrated": calibrated, "divergence": reached if calibrated else None}


def _of(way: Way) -> Row:
    return {"way": way.name, "control": way.control, **way.columns}


def _failed(way: Way, reason: str) -> Row:
    return _of(way) | {
        **{"coefficient": None, "question": "", "answer": "", "score": None, "reason": reason},
        **{"calibrated": False, "divergence": None},
    }


def made_by(way: Way, bench: Bench) -> ConceptVectors | None:
    """The way's vectors of this concept, made once for a bench."""
    if way.make is None:
        return None
    if way.name not in bench.made:
        bench.made[way.name] = quietly(way.make, bench)
    return bench.made[way.name]


def quietly(make: Callable[..., Any], *given: Any) -> Any:
    """What ``make`` makes; that a label or a head tells nothing is measured, not warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*given)
