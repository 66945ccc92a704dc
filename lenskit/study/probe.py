"""Answers over coefficients around the one that is calibrated, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit.concepts import Concept
from lenskit.generation import SteeringRow, generate_steered
from lenskit.scoring import Judge, as_verdict, repetition
from lenskit.study.calibration import calibrate
from lenskit.study.divergence import Unsteered, divergence
from lenskit.vectors import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

REPEATED = 0.3
_STEPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_FEWER = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Probe:
    """One concept on one model: its questions, the judge, and the model as it is."""

    model: TransformerBridge
    concept: Concept
    questions: tuple[str, ...]
    judge: Judge
    base: Unsteered
    relative: bool | None
    options: Mapping[str, Any]

    def prompted(self) -> float:
        """The share of answers that show the concept when the prefix stands before the question."""
        rows = [SteeringRow(each, prefix=self.concept.prefix) for each in self.questions]
        return sum(map(self._shows, self.questions, self._answers(rows))) / len(rows)

    def curves(
        self, ways: Sequence[ConceptVectors], *, given: float | None = None, both: bool = True
    ) -> list[pd.DataFrame]:
        """A table for each of the vectors: shares of its answers by coefficient, and divergence."""
        moving = {"relative": self.relative, "batch_size": self.options["batch_size"]}
        found = calibrate(self.model, list(ways), self.base, **moving)
        tried = []
        for each in found:
            middle = each.coefficient if each.reached else 1.0
            own = [middle * step for step in (_STEPS if both else _FEWER)]
            own += [-one for one in own] if both else []
            tried.append([*own, given] if given and given not in own else own)
        pairs = [(i, c) for i, own in enumerate(tried) for c in sorted(own)]
        rows = [SteeringRow(q, ways[i], c) for i, c in pairs for q in self.questions]
        plain = self._answers([SteeringRow(each) for each in self.questions])
        answers = iter(self._answers(rows))
        moved = divergence(
            self.model, self.base, [ways[i] for i, _ in pairs], [c for _, c in pairs], **moving
        )
        tables: list[list[dict[str, float]]] = [[] for _ in ways]
        for (i, c), far in zip(pairs, moved.tolist(), strict=True):
            said = [next(answers) for _ in self.questions]
            shares: dict[str, list[float]] = {
                "shown": [*map(self._shows, self.questions, said)],
                "repeated": [repetition(each) > REPEATED for each in said],
                "unchanged": [a == b for a, b in zip(said, plain, strict=True)],
            }
            means = {name: sum(values) / len(values) for name, values in shares.items()}
            tables[i].append({"coefficient": c, **means, "divergence": far})
        return [pd.DataFrame(own) for own in tables]

    def _answers(self, rows: Sequence[SteeringRow]) -> list[str]:
        return list(generate_steered(self.model, rows, relative=self.relative, **self.options))

    def _shows(self, question: str, answer: str) -> float:
        return float(as_verdict(self.judge(self.concept, question, answer)).score)
