"""Which tokens are steered, and what it costs on tasks that have nothing to do with the concept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lenskit.concepts import Concept
from lenskit.embedded.tasks import UNRELATED
from lenskit.generation import SteeringRow, generate_steered
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.cells import Measure, calibrated
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant
from lenskit.tasks import Task, embedded
from lenskit.vectors import ConceptVectors


@dataclass(frozen=True)
class AtClosing:
    """One vector a block, added at the closing tokens of the prompt's end, or at one of them.

    ``which``: "all" closing tokens, or the "selected" one of each block.
    """

    variant: Variant
    which: Literal["all", "selected"]

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        vectors = bench.steering(self.variant)
        if vectors is None:
            return None
        prompts = bench.capture.prompts
        number = len(prompts.candidates)
        kept = torch.ones(len(vectors), number)
        if self.which == "selected":
            index = bench.selection(self.variant.token).index
            kept = torch.nn.functional.one_hot(index, number).float()
        return replace(
            vectors,
            directions=vectors.directions[:, None] * kept[:, :, None],
            validation=vectors.validation[:, None].expand(-1, number).clone(),
            selection=f"{vectors.selection}, added at closing tokens: {self.which}",
            candidates=prompts.candidates,
            closing=tuple(prompts.tokens.input_ids[0, -number:].tolist()),
        )


@dataclass(frozen=True)
class Unrelated:
    """Scores of tasks under each way at its calibrated coefficient, and with nothing steered."""

    ways: tuple[Way, ...]
    tasks: tuple[Task, ...]

    def identity(self) -> list[Any]:
        """What decides the scores."""
        tasks = [
            [task.name, task.max_new_tokens, [[*prompt.messages] for prompt in task.prompts]]
            for task in self.tasks
        ]
        return [list(self.ways), tasks]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        found: list[Row] = []
        for way, vectors, coefficient in calibrated(bench, self.ways, setting):
            for task in self.tasks:
                rows = [
                    SteeringRow(
                        prompt.messages, vectors, way.factor * coefficient, positions=way.positions
                    )
                    for prompt in task.prompts
                ]
                answers = generate_steered(
                    bench.model,
                    rows,
                    relative=True,
                    max_new_tokens=task.max_new_tokens,
                    batch_size=setting.batch_size,
                )
                found.append({"way": way.name, "task": task.name, "score": task.score(answers)})
        return found


def where(
    model: Model,
    concepts: Iterable[Concept] | Concept,
    *,
    blocks: Sequence[int] | None = None,
    tasks: Sequence[Task] | None = None,
    **options: Any,
) -> Experiment:
    """One vector at all tokens, at closing tokens, in the prompt, or where the answer is written.

    Beside it each closing token with a vector of its own. ``blocks``: those that are steered, by
    default all. The measure "unrelated tasks" is the mean score of ``tasks`` (by default the
    embedded corpus's unrelated exercises, four of each) at the coefficient that moves the model by
    the experiment's target; "unsteered" is what it would be. ``parts["tasks"]`` has each task.

    ``options`` as in ``tokens``.
    """
    chosen = tuple([embedded(name, 4) for name in UNRELATED] if tasks is None else tasks)
    with begun("where", model, concepts, options) as run:
        placed = "all" if blocks is None else ",".join(map(str, blocks))
        own = Variant(blocks=placed)
        ways = (
            Way("all tokens", Fitted(own)),
            Way("the selected token", AtClosing(own, "selected")),
            Way("closing tokens", AtClosing(own, "all")),
            Way("closing tokens, each its own vector", Fitted(replace(own, token="each"))),
            Way("the prompt", Fitted(own), positions="prompt"),
            Way("generated tokens", Fitted(own), positions="generated"),
            Way("from the prompt's last token on", Fitted(own), positions="answer"),
        )
        still = Way("unsteered", control="unsteered")
        measure = Measure("unrelated tasks", Unrelated((*ways, still), chosen))
        everything = [*ways, *controls(own, several=run.several)]
        run.prepare(*everything, measure)
        answers, cost = run.answers(everything), run.measured(measure)
        keys = ["concept_class", "concept", "way"]
        mean = cost.groupby(keys, sort=False)["score"].mean().rename("unrelated tasks")
        return run.scored(
            answers,
            "Which tokens should be steered, and what does it cost elsewhere?",
            more=mean.reset_index(),
            parts={
                "tasks": cost.groupby(["way", "task"], sort=False)["score"].mean().reset_index()
            },
        )
