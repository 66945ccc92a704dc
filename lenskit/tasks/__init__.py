"""Tasks that attention steering is measured on: prompts with an emphasised span, and judges.

``embedded`` makes a task of the embedded corpus and ``read_task`` one of PASTA's from its public
files; both give a ``Task``. Its answers are any texts, from ``lk.generate`` on the prompts'
messages under whatever steers the model, or from ``choose``, which picks the likeliest label::

    task = lk.tasks.embedded("format", 100, kind="json", length=(100, 150))
    ask = partial(lk.generate, model, max_new_tokens=task.max_new_tokens)
    answers = {"plain": ask([prompt.messages for prompt in task.prompts])}
    quoted = [lk.tasks.marked(prompt, "quotes") for prompt in task.prompts]
    answers["quoted"] = ask([prompt.messages for prompt in quoted])
    lk.tasks.compare(task, answers)

A judge is a callable ``(prompt, answer) -> Verdict``, and a task may be judged by another one:
``dataclasses.replace(task, judge=lk.tasks.published_format)``. Its score may be any number, so that
``lambda prompt, answer: lk.Verdict(lk.tasks.ngram_entropy(answer), "")`` compares fluency.
"""

from __future__ import annotations

from lenskit.embedded.tasks import TaskPrompt
from lenskit.tasks.choices import choose, label_log_probs
from lenskit.tasks.emphasis import MARKS, few_shot, marked
from lenskit.tasks.judges import (
    judge_json,
    judge_label,
    judge_pronoun_change,
    published_all_pronouns,
    published_format,
    published_prediction,
    published_pronouns,
)
from lenskit.tasks.public import PUBLIC, bare, read_task
from lenskit.tasks.spans import emphasised_span
from lenskit.tasks.table import compare
from lenskit.tasks.task import Task, TaskJudge, embedded
from lenskit.tasks.texts import consistency, ngram_entropy
from lenskit.tasks.words import with_they

__all__ = [
    "MARKS",
    "PUBLIC",
    "Task",
    "TaskJudge",
    "TaskPrompt",
    "bare",
    "choose",
    "compare",
    "consistency",
    "embedded",
    "emphasised_span",
    "few_shot",
    "judge_json",
    "judge_label",
    "judge_pronoun_change",
    "label_log_probs",
    "marked",
    "ngram_entropy",
    "published_all_pronouns",
    "published_format",
    "published_prediction",
    "published_pronouns",
    "read_task",
    "with_they",
]


def __dir__() -> list[str]:
    return __all__
