"""The tasks that attention steering is measured on, as part of the embedded corpus.

``TASKS`` names them; ``task_shares(total)`` gives them to a mixture. Each is built for a split
("train" or "held_out") as a ``TaskPrompt`` with the span to emphasise, and judged exactly. A new
task is a file of wordings in ``data/grammar/tasks``, a function that writes a ``TaskPrompt``, and
a line below.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from lenskit.embedded.dialogue import Task
from lenskit.embedded.tasks.bias import judge_bias, pronoun_bias
from lenskit.embedded.tasks.emphasis import judge_family, marked_span, solved_examples
from lenskit.embedded.tasks.facts import fact_document, fact_question, judge_document, judge_fact
from lenskit.embedded.tasks.formats import competing_formats, format_request, judge_format
from lenskit.embedded.tasks.occupation import judge_occupation, occupation
from lenskit.embedded.tasks.passages import passage
from lenskit.embedded.tasks.prompt import SPLITS, TaskPrompt, TaskSpec, judge_text
from lenskit.embedded.tasks.pronouns import judge_pronouns, pronoun_change
from lenskit.embedded.tasks.register import judge_register, register
from lenskit.embedded.tasks.rules import judge_rule, system_rule
from lenskit.embedded.tasks.unrelated import EXERCISES, unrelated

__all__ = ["SPLITS", "TASKS", "UNRELATED", "TaskPrompt", "TaskSpec", "task_shares"]

_SPECS = (
    TaskSpec("format", format_request, judge_format, 0.13),
    TaskSpec("pronouns", pronoun_change, judge_pronouns, 0.09),
    TaskSpec("occupation", occupation, judge_occupation, 0.07),
    TaskSpec("fact_document", fact_document, judge_document, 0.08),
    TaskSpec("fact_question", fact_question, judge_fact, 0.11),
    TaskSpec("passage", passage, judge_fact, 0.14),
    TaskSpec("competing_formats", competing_formats, judge_format, 0.05),
    TaskSpec("marked_span", marked_span, judge_family, 0.05),
    TaskSpec("solved_examples", solved_examples, judge_family, 0.05),
    TaskSpec("register", register, judge_register, 0.045),
    TaskSpec("system_rule", system_rule, judge_rule, 0.04),
    TaskSpec("pronoun_bias", pronoun_bias, judge_bias, 0.04),
    *(TaskSpec(kind, partial(unrelated, kind), judge_text, 0.021) for kind in EXERCISES),
)
UNRELATED = tuple(EXERCISES)
TASKS: Mapping[str, TaskSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def task_shares(total: float = 1.0) -> dict[Task, float]:
    """Every task with its share of a mixture in which all tasks together have ``total``."""
    return {spec: spec.share * total for spec in TASKS.values()}
