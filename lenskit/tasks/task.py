"""A task: prompts that each emphasise a span, and a judge of one answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lenskit._arguments import whole
from lenskit._display import Displayed, count, quoted
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.tasks import SPLITS, TASKS, TaskPrompt
from lenskit.embedded.tasks.people import ATTRIBUTES, values
from lenskit.scoring import Verdict

TaskJudge = Callable[[TaskPrompt, str], Verdict]


@dataclass(frozen=True, repr=False)
class Task(Displayed):
    """Prompts with an emphasised span, the judge of one answer, and how long answers may be.

    ``judge(prompt, answer)`` gives a ``Verdict``: a score from 0 to 1 and its reason.
    ``dataclasses.replace(task, judge=…)`` asks another judge about the same prompts. Prompts that
    share ``metadata["case"]`` are wordings of one case and count together as one. ``labels``: what
    ``choose`` picks from; without them it picks from each prompt's ``target`` and ``otherwise``.
    Raises ValueError without prompts.
    """

    name: str
    prompts: tuple[TaskPrompt, ...]
    judge: TaskJudge
    max_new_tokens: int = 64
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "labels", tuple(self.labels))
        if not self.prompts:
            raise ValueError(f"task {self.name!r} has no prompts; give one at least")

    def __len__(self) -> int:
        return len(self.prompts)

    def _headline(self) -> str:
        return f"Task {self.name!r}, {count(len(self), 'prompt')}"

    def _rows(self) -> dict[str, object]:
        first = self.prompts[0]
        shown: dict[str, object] = {"first prompt": first.messages[-1]["content"]}
        shown |= {"emphasised": first.emphasised, "target": first.target}
        shown["judge"] = getattr(self.judge, "__name__", type(self.judge).__name__)
        return shown | ({"labels": quoted(self.labels)} if self.labels else {})

    @property
    def cases(self) -> list[list[int]]:
        """The places of each case's prompts, in the order of the first of them."""
        found: dict[object, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            found.setdefault(prompt.metadata.get("case", ("prompt", i)), []).append(i)
        return list(found.values())

    def verdicts(self, answers: Sequence[str]) -> list[Verdict]:
        """The verdict of each prompt's answer. Raises ValueError for another number of answers."""
        if isinstance(answers, str) or len(answers) != len(self.prompts):
            given = "one text" if isinstance(answers, str) else str(len(answers))
            raise ValueError(
                f"answers: task {self.name!r} has {count(len(self), 'prompt')}, got {given}"
            )
        return [self.judge(p, answer) for p, answer in zip(self.prompts, answers, strict=True)]

    def scores(self, answers: Sequence[str]) -> Float[np.ndarray, " case"]:
        """The mean score of each case, in the order of the first of its prompts."""
        scores = np.array([verdict.score for verdict in self.verdicts(answers)], dtype=float)
        return np.array([scores[places].mean() for places in self.cases])

    def score(self, answers: Sequence[str]) -> float:
        """The metric of the task: the mean over its cases, from 0 to 1."""
        return float(self.scores(answers).mean())

    def reasons(self, answers: Sequence[str]) -> dict[str, int]:
        """How many answers were judged for each reason, the most frequent first."""
        return dict(Counter(verdict.reason for verdict in self.verdicts(answers)).most_common())


@dataclass(frozen=True)
class Finished:
    """A judge for which an answer that was cut off fails: its text cannot show how it goes on."""

    judge: TaskJudge

    def __call__(self, prompt: TaskPrompt, answer: str) -> Verdict:
        verdict = self.judge(prompt, answer)
        cut = verdict.score and not getattr(answer, "finished", True)
        return Verdict(0, "unfinished") if cut else verdict


def embedded(
    name: str, number: int = 100, seed: int = 0, split: str = "held_out", **conditions: Any
) -> Task:
    """A task of the embedded corpus with its exact judge, the same for the same arguments.

    ``conditions`` are those of its builder: ``kind``; ``length=(100, 150)`` for that many tokens
    between instruction and question (format, pronouns, occupation), ``asked=True`` for prompts that
    do ask for something; ``kind="conflicts"``, ``distractors=2`` and ``rank`` (passage);
    ``kinds`` and ``emphasise="earlier"`` (competing_formats); ``plea`` (system_rule) and so on.
    ``lenskit.embedded.tasks.UNRELATED`` names the exercises that must not suffer. Where all prompts
    ask for the same attribute, its values are the labels. Raises ValueError for another name, split
    or condition.

    >>> far = lk.tasks.embedded("format", 3, kind="json", length=(100, 150))
    >>> far.score([prompt.target for prompt in far.prompts])
    1.0
    >>> far.reasons(["", "{", far.prompts[2].otherwise])
    {'empty': 1, 'ill formed': 1, 'other format': 1}
    """
    if name not in TASKS:
        raise ValueError(f"there is no embedded task {name!r}; there are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    number = whole("number", number, 1)
    try:
        prompts = TASKS[name].prompts(load_grammar(), number, seed, split, **conditions)
    except (TypeError, LookupError) as error:
        raise ValueError(f"task {name!r} does not know these conditions: {error!r}") from error
    kind = conditions.get("kind")
    if kind is not None and prompts[0].metadata.get("kind") != kind:
        raise ValueError(f"task {name!r} has no kind {kind!r}")
    attribute = "occupation" if name == "occupation" else conditions.get("attribute")
    named = attribute in ATTRIBUTES and name in ("occupation", "fact_question", "passage")
    labels = values(str(attribute)) if named else ()
    return Task(name, tuple(prompts), Finished(TASKS[name].judge), labels=labels)
