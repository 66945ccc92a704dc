"""One experiment at work: its concepts, its setting, and the folder that keeps what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.models import model_fingerprint
from lenskit.prompts import build_prompts
from lenskit.scoring import check_grammar_judge, grammar_judge
from lenskit.study.answers import check_concept
from lenskit.study.cells import CellStore, Key, Row
from lenskit.study.engine import CellsFailed, Pool, Results, run_cells
from lenskit.study.experiments.cells import Cell, Measure, Task, cell_key, compute
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.scores import CONCEPT, SCORES, by_concept, summary
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Way
from lenskit.study.pools import pool_of
from lenskit.study.run import distinct
from lenskit.study.tables import table_of
from lenskit.study.ways import warn_of_silence

Model: TypeAlias = TransformerBridge | Callable[[], TransformerBridge]

_ABOUT: Key = ("model",)
_OPTIONS = ("out", "workers", "gpus", "ray", "progress", "command")


@dataclass(frozen=True)
class Shape:
    """The model under study: its fingerprint and sizes, and the template's closing tokens."""

    model: str
    blocks: int
    heads: int
    candidates: tuple[str, ...]

    @property
    def some_blocks(self) -> tuple[int, ...]:
        """At most eight blocks, evenly spaced, the first and the last among them."""
        most = min(self.blocks, 8)
        return tuple(round(i * (self.blocks - 1) / max(1, most - 1)) for i in range(most))


@dataclass(frozen=True)
class Run:
    """What an experiment is made with: it asks for answers and measurements of all its concepts."""

    name: str
    concepts: tuple[Concept, ...]
    setting: Setting
    shape: Shape
    command: str
    pool: Pool
    store: CellStore
    progress: bool

    @property
    def several(self) -> bool:
        """Whether there are two concepts or more."""
        return len(self.concepts) > 1

    def prepare(self, *tasks: Task) -> None:
        """Compute these together, so that they share each concept's prompts, capture and fits."""
        self._cells(tasks)

    def answers(self, ways: Iterable[Way]) -> pd.DataFrame:
        """Every judged answer of these ways; a way without vectors for a concept has one row there
        that says why (its question is empty)."""
        rows = self._cells(list(ways))
        warn_of_silence(row for row in rows if row["score"] is not None)
        table = table_of(rows)
        return table.astype({"score": float, "coefficient": float, "divergence": float})

    def measured(self, measure: Measure) -> pd.DataFrame:
        """The rows of a measurement, with the concept that they are of."""
        return table_of(self._cells([measure]))

    def scored(
        self,
        answers: pd.DataFrame,
        question: str,
        *,
        reference: str | None = None,
        references: Mapping[str, str] | None = None,
        more: pd.DataFrame | None = None,
        parts: Mapping[str, pd.DataFrame] | None = None,
        notes: Sequence[str] = (),
    ) -> Experiment:
        """Ways compared by their scores; by default the first is what others are compared to.

        ``references``: what each is compared to, where that differs; ``reference`` then says what
        they are. ``more``: further measures, in columns beside concept and way.
        """
        rows = by_concept(answers)
        further = [] if more is None else [name for name in more if name not in (*CONCEPT, "way")]
        if more is not None:
            rows = rows.merge(more, on=[*CONCEPT, "way"], how="left")
        first = rows["way"].iloc[0] if reference is None else reference
        to = first if references is None else references
        table = summary(rows, (*SCORES, *further), reference=to, seed=self.setting.seed)
        about = answers.drop_duplicates("way").drop(
            columns=[
                *("concept_class", "concept", "coefficient", "question", "answer", "score"),
                *("reason", "calibrated", "divergence", "chosen"),
            ],
            errors="ignore",
        )
        table = table.merge(about, on="way", how="left")
        return self.result(
            table,
            question,
            reference=first,
            parts={"by concept": rows, **(parts or {})},
            answers=answers,
            notes=[_scores_said(self.setting), *_failures(answers), *notes],
        )

    def result(
        self,
        table: pd.DataFrame,
        question: str,
        *,
        reference: str = "",
        by: str = "way",
        parts: Mapping[str, pd.DataFrame] | None = None,
        answers: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
    ) -> Experiment:
        """The result with what all experiments say of themselves."""
        said = f"{self.shape.model}, {len(self.concepts)} concepts, {self.setting.prompts} prompts."
        return Experiment(
            self.name,
            question,
            self.command,
            table,
            reference,
            by,
            dict(parts or {}),
            pd.DataFrame() if answers is None else answers,
            (said, *notes),
        )

    def _cells(self, tasks: Sequence[Task]) -> list[Row]:
        groups = []
        for place, concept in enumerate(self.concepts):
            other = self._other(place)
            cells = [Cell(concept, other, task) for task in tasks]
            groups.append({cell_key(cell): cell for cell in cells})
        run_cells(
            groups, self.pool, self.store, score=_score, title=self.name, progress=self.progress
        )
        about = [(c.concept_class or "custom", c.name) for c in self.concepts]
        return [
            {"concept_class": of[0], "concept": of[1]} | row
            for of, group in zip(about, groups, strict=True)
            for key in group
            for row in self.store.cells[key]
        ]

    def _other(self, place: int) -> Concept | None:
        """The next concept of the same class, or of any where the class has no other."""
        own = self.concepts[place]
        rest = [*self.concepts[place + 1 :], *self.concepts[:place]]
        same = [one for one in rest if one.concept_class == own.concept_class]
        return next(iter(same or rest), None)


@contextmanager
def begun(
    name: str, model: Model, concepts: Iterable[Concept] | Concept, options: Mapping[str, Any]
) -> Iterator[Run]:
    """An experiment whose concepts, setting and model are seen to fit; its workers end with it.

    ``model``: one that is loaded, or a function that loads it for each of ``workers``. Raises
    ValueError and TypeError for what cannot be meant, before anything is computed or written.
    """
    chosen = tuple(distinct(concepts))
    for concept in chosen:
        check_concept(concept)
    own = {key: value for key, value in options.items() if key in _OPTIONS}
    setting = Setting.of({key: v for key, v in options.items() if key not in _OPTIONS})
    command = own.get("command") or f"lk.experiments.{name}(model, {len(chosen)} concepts)"
    progress = bool(own.get("progress", True))
    parts = (own.get("workers"), own.get("gpus"), own.get("ray"))
    with pool_of(model, partial(_compute, setting), *parts) as pool:
        said = CellStore(None, {})
        try:
            run_cells([{_ABOUT: chosen}], pool, said, progress=False)
        except CellsFailed as error:
            raise error.failures[_ABOUT].error from None
        about = said.cells[_ABOUT][0]
        shape = Shape(**(about | {"candidates": tuple(about["candidates"])}))
        settings = {"experiment": name, "model": shape.model, "setting": setting.described()}
        folder = own.get("out")
        store = CellStore(None if folder is None else Path(folder) / "cells" / name, settings)
        yield Run(name, chosen, setting, shape, command, pool, store, progress)


def _compute(setting: Setting, model: TransformerBridge, group: Mapping[Key, Any]) -> Results:
    if _ABOUT not in group:
        return compute(setting, model, group)
    concepts = group[_ABOUT]
    if setting.judge is grammar_judge:
        check_grammar_judge(model, concepts)
    some = build_prompts(model, concepts[0], number=2, statements=setting.statements)
    return {
        _ABOUT: [
            {"model": model_fingerprint(model), "candidates": list(some.candidates)}
            | {"blocks": model.cfg.n_layers, "heads": model.cfg.n_heads}
        ]
    }


def _score(rows: Sequence[Row]) -> float | None:
    """The best mean score over the coefficients, of answers that are no control's."""
    table = pd.DataFrame([row for row in rows if row.get("score") is not None])
    if not len(table) or "control" not in table or table["control"].any():
        return None
    return float(table.groupby("coefficient")["score"].mean().max())


def _scores_said(setting: Setting) -> str:
    budget = ", ".join(f"{each:g}" for each in setting.coefficients)
    return (
        f"Every way has the coefficients {budget}, in mean residual norms, shared by the blocks "
        "that are steered. best: each question's best one (optimistic); held out: chosen on two "
        "questions, scored on the others; one coefficient: the best of all other concepts; same "
        f"divergence: the one that moves the model by {setting.target:g} nats a token on "
        f"{len(setting.questions)} neutral questions; steerable: share of concepts that any "
        "coefficient brings into any answer. Means over concepts with 95 % bootstrap intervals; "
        "differences are paired."
    )


def _failures(answers: pd.DataFrame) -> list[str]:
    """What could not be made, and of how many concepts."""
    failed = answers[answers["question"] == ""]
    return [
        f"«{way}» could not be made for {len(own)} of the concepts: {own['reason'].iloc[0]}"
        for way, own in failed.groupby("way", sort=False)
    ]
