"""Several ways to get answers, compared on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lenskit._display import quoted
from lenskit.embedded.tasks import TaskPrompt
from lenskit.scoring import mean_interval
from lenskit.tasks.task import Task


def compare(
    task: Task,
    answers: Mapping[str, Sequence[str]],
    to: str | None = None,
    *,
    by: Callable[[TaskPrompt], Hashable] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each named list of answers to the task's prompts: its score, and what it gains.

    ``score``: the mean over the ``n`` cases, with the ends ``low`` and ``high`` of its interval at
    ``level`` (percentiles of ``draws`` bootstrap samples of cases; NaN for a single one).
    ``difference``: the mean over the same cases of the score less that of the row ``to`` (by
    default the first), with ``difference_low`` and ``difference_high``. ``by``: what prompts are
    grouped by, such as ``lambda prompt: prompt.metadata["kind"]``; a column ``group`` then comes
    first. Raises ValueError where ``to`` is no row, or answers are not as many as prompts.

    >>> task = lk.tasks.embedded("count", 4)
    >>> answers = {"nothing": [""] * 4, "oracle": [prompt.target for prompt in task.prompts]}
    >>> table = lk.tasks.compare(task, answers)
    >>> table[["name", "score", "difference"]].values.tolist()
    [['nothing', 0.0, 0.0], ['oracle', 1.0, 1.0]]
    """
    if not answers:
        raise ValueError("answers is empty; give at least one name with its answers")
    reference = next(iter(answers)) if to is None else to
    if reference not in answers:
        raise ValueError(f"to={to!r} is not among the answers, which are {quoted(answers)}")
    for name, own in answers.items():
        if isinstance(own, str) or len(own) != len(task):
            given = "one text" if isinstance(own, str) else f"{len(own)}"
            raise ValueError(f"answers[{name!r}]: the task has {len(task)} prompts, got {given}")
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(task.prompts):
        groups.setdefault(None if by is None else by(prompt), []).append(i)

    def interval(values: np.ndarray) -> tuple[float, float]:
        return mean_interval(values, level=level, draws=draws, seed=seed)

    rows = []
    for group, places in groups.items():
        part = replace(task, prompts=tuple(task.prompts[i] for i in places))
        scores = {name: part.scores([own[i] for i in places]) for name, own in answers.items()}
        for name, own in scores.items():
            gained = own - scores[reference]
            low, high = interval(own)
            gain_low, gain_high = interval(gained)
            rows.append(
                ({} if by is None else {"group": group})
                | {"name": name, "score": own.mean(), "low": low, "high": high, "n": len(own)}
                | {"difference": gained.mean()}
                | {"difference_low": gain_low, "difference_high": gain_high}
            )
    return pd.DataFrame(rows)
