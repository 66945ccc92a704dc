"""The cells of a study: answers of variants of concepts, generated together and judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import product
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.generation import SteeringRow, generate_steered
from lenskit.recipes import Recipe
from lenskit.scoring import Judge, as_verdict, grammar_judge
from lenskit.study.bench import Workbench
from lenskit.study.cells import Key, Row
from lenskit.study.clock import stage
from lenskit.study.engine import Failure, Results, failure
from lenskit.study.identity import identity
from lenskit.study.ways import Variant, settings_of

Cell = tuple[Concept, Variant]


@dataclass(frozen=True)
class Settings:
    """What decides the answers and scores of a study, and ``batch_size``, which does not."""

    recipe: Recipe
    coefficients: tuple[float, ...]
    relative: bool
    learners: Mapping[str, Callable[[], object]]
    prompts: int = 400
    statements: Sequence[str] | None = None
    judge: Judge = grammar_judge
    max_new_tokens: int = 50
    batch_size: int = 256
    seed: int = 0

    @classmethod
    def of(
        cls, variants: Sequence[Variant] | Variant | None, options: Mapping[str, Any]
    ) -> tuple[tuple[Variant, ...], Settings]:
        """Variants and settings, checked; what is not given is the recipe's or the default."""
        ways, made = settings_of(variants, options)
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(made) - names):
            raise TypeError(f"a study has no option {', '.join(unknown)}; it has {sorted(names)}")
        if not callable(made.get("judge", grammar_judge)):
            raise TypeError(f"judge must be callable, got {made['judge']!r}")
        for name in ("prompts", "max_new_tokens", "batch_size"):
            if made.get(name, 1) < 1:
                raise ValueError(f"{name} must be 1 or more, got {made[name]}")
        used = {way.learner for way in ways}
        made["learners"] = {name: made["learners"][name] for name in sorted(used)}
        return tuple(ways), cls(**made)

    def described(self) -> dict[str, Any]:
        """JSON that is equal for what gives equal results."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own["recipe"] = asdict(self.recipe) | {"why": ""}
        del own["batch_size"]
        return identity(own)


def check_concept(concept: Concept) -> None:
    """Raise ValueError for too few questions: two choose the coefficient, the rest are scored."""
    if len(concept.questions) < 3:
        raise ValueError(
            f"concept {concept.name!r} has {len(concept.questions)} questions, and three are the "
            "fewest; give Concept(questions=...)"
        )


def cell_key(concept: Concept, variant: Variant) -> Key:
    """A key that differs where concepts or variants differ in anything, however they are named."""
    told = [concept.concept_class, concept.name, concept.prefix, *concept.questions]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return (concept.concept_class or "custom", concept.name, *astuple(variant), digest)


def study_concept(
    model: TransformerBridge,
    concept: Concept,
    variants: Sequence[Variant] | Variant | None = None,
    **options: Any,
) -> list[dict]:
    """Tidy rows of one concept: every variant, coefficient and test question, answered and judged.

    Options are those of ``run_study``. Raises ValueError for a concept with fewer than three test
    questions, and whatever a variant or the judge raises.

    >>> options = {"coefficients": 0.04, "prompts": 40, "max_new_tokens": 3}
    >>> rows = lk.study_concept(model, concept, lk.Variant(), **options)
    >>> [row["question"] for row in rows] == list(concept.questions)
    True
    """
    check_concept(concept)
    ways, settings = Settings.of(variants, options)
    cells = {cell_key(concept, variant): (concept, variant) for variant in ways}
    found: list[dict] = []
    for rows in study_cells(model, cells, settings).values():
        if isinstance(rows, Failure):
            raise rows.error
        found += rows
    return found


def study_cells(
    model: TransformerBridge, cells: Mapping[Key, Cell], settings: Settings
) -> dict[Key, list[Row] | Failure]:
    """The rows of each cell, or why there are none.

    The variants of a concept share prompts, capture and fits; the answers of all cells share
    batches. A cell that fails takes no other with it.
    """
    planned, failed = _plan(model, cells, settings)
    texts = answered(
        model,
        planned,
        relative=settings.relative,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    found: dict[Key, list[Row] | Failure] = {}
    for key, cell in cells.items():
        if key in failed:
            found[key] = failed[key]
        elif isinstance(answers := texts[key], Failure):
            found[key] = answers
        else:
            try:
                concept, variant = cell
                found[key] = [
                    about | asdict(variant) | said
                    for about, said in judged(concept, planned[key], answers, settings.judge)
                ]
            except Exception as error:
                found[key] = failure(error)
    return found


def _plan(
    model: TransformerBridge, cells: Mapping[Key, Cell], settings: Settings
) -> tuple[dict[Key, list[SteeringRow]], dict[Key, Failure]]:
    """What is to be answered for each cell, once its vectors are fitted."""
    planned, failed = {}, {}
    for concept in dict.fromkeys(concept for concept, _ in cells.values()):
        own = {key: variant for key, (other, variant) in cells.items() if other == concept}
        # Captures are large: one concept's is let go before the next.
        bench = Workbench(
            model,
            concept,
            settings.prompts,
            settings.seed,
            settings.learners,
            settings.recipe,
            settings.statements,
        )
        for key, variant in own.items():
            try:
                vectors = bench.steering(variant)
            except Exception as error:
                failed[key] = failure(error)
                continue
            prefix = concept.prefix if variant.control == "prompted" else ""
            coefficients = (0.0,) if variant.still else settings.coefficients
            planned[key] = [
                SteeringRow(question, vectors, coefficient, prefix)
                for coefficient, question in product(coefficients, concept.questions)
            ]
    return planned, failed


def answered(
    model: TransformerBridge, planned: Mapping[Key, Sequence[SteeringRow]], **options: Any
) -> dict[Key, list[str] | Failure]:
    """The answers of each cell; all in one list of batches, unless one of them fails.

    ``options`` are those of ``generate_steered``.
    """
    rows = [row for own in planned.values() for row in own]
    try:
        with stage("answers"):
            texts = generate_steered(model, rows, **options)
    except Exception as error:
        if len(planned) == 1:
            return dict.fromkeys(planned, failure(error))
        alone = [answered(model, {key: own}, **options) for key, own in planned.items()]
        return {key: texts for each in alone for key, texts in each.items()}
    left = iter(texts)
    return {key: [next(left) for _ in own] for key, own in planned.items()}


def judged(
    concept: Concept, rows: Sequence[SteeringRow], answers: Sequence[str], judge: Judge
) -> list[tuple[Row, Row]]:
    """For each answer whose it is, and what was asked, said and judged."""
    about = {"concept_class": concept.concept_class or "custom", "concept": concept.name}
    found = []
    for row, text in zip(rows, answers, strict=True):
        with stage("judge"):
            verdict = as_verdict(judge(concept, str(row.question), text))
        said = {"coefficient": row.coefficient, "question": row.question, "answer": str(text)}
        found.append((about, said | {"score": verdict.score, "reason": verdict.reason}))
    return found


def studied(settings: Settings, model: TransformerBridge, cells: Mapping[Key, Cell]) -> Results:
    """``study_cells`` as the engine calls it."""
    return study_cells(model, cells, settings)
