"""Ways to get answers to a task, each a change of its prompts, an edit, vectors or weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

from lenskit.attention import AttentionEdit, Heads, KeyPolicy, Policy, Span, span
from lenskit.generation import SteeringRow, generate_steered
from lenskit.intervention import Positions
from lenskit.models import conversation_ids
from lenskit.scoring import repetition
from lenskit.study import Row
from lenskit.tasks import Task, TaskPrompt, emphasised_span, few_shot, marked, ngram_entropy

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import Vectors


@dataclass(frozen=True)
class Trial:
    """A task, what it is asked for (``role``), and solved prompts of the train split."""

    task: Task
    role: str
    solved: tuple[TaskPrompt, ...] = ()

    @property
    def name(self) -> str:
        """That of the task."""
        return self.task.name


Change: TypeAlias = Callable[[TaskPrompt, Trial], TaskPrompt]
Where: TypeAlias = Callable[["TransformerBridge", TaskPrompt, TaskPrompt], Span | None]


def unchanged(prompt: TaskPrompt, trial: Trial) -> TaskPrompt:
    """The prompt as it is."""
    return prompt


def with_mark(mark: str, prompt: TaskPrompt, trial: Trial) -> TaskPrompt:
    """The prompt with its span marked."""
    return marked(prompt, mark)


def with_examples(
    model: TransformerBridge, number: int, seed: int, prompt: TaskPrompt, trial: Trial
) -> TaskPrompt:
    """The prompt behind correct examples, as many as the model's positions allow.

    It is as it was where the trial has none of its kind.
    """
    kind = prompt.metadata.get("kind")
    most = getattr(model.original_model.config, "max_position_embeddings", None)
    if sum(each.metadata.get("kind") == kind for each in trial.solved) <= number:
        return prompt
    for fewer in range(number, 0, -1):
        shown = few_shot(prompt, trial.solved, fewer, seed=seed)
        length = int(conversation_ids(model.tokenizer, [shown.messages]).lengths[0])
        if most is None or length + trial.task.max_new_tokens <= most:
            return shown
    return prompt


def own_span(model: TransformerBridge, prompt: TaskPrompt, changed: TaskPrompt) -> Span | None:
    """The emphasised span of the changed prompt."""
    return emphasised_span(model, changed)


def examples_span(model: TransformerBridge, prompt: TaskPrompt, changed: TaskPrompt) -> Span | None:
    """The span together with all examples before it."""
    own = emphasised_span(model, changed)
    more = len(changed.messages) - len(prompt.messages)
    if not more:
        return own
    leading = int(changed.messages[0]["role"] == "system")
    texts = [changed.messages[leading + i]["content"] for i in (0, more)]
    first = span(model, changed.messages, texts[0], nth=0)
    # Texts of an example may be told again behind it, but the prompt's own text stands last.
    behind = span(model, changed.messages, texts[1], nth=-1)
    shown = range(first.positions[0], behind.positions[0])
    return own | Span(tuple(shown), own.ids, "examples")


@dataclass(frozen=True, eq=False)
class Way:
    """How a task is answered, by name.

    ``change`` makes the prompt that is asked, and ``where`` finds the span that ``policy`` acts on
    (``None``: this row is left alone). ``vectors`` with ``coefficient`` and ``positions`` as in
    ``SteeringRow``. ``inside`` is a context entered for the answers, such as of changed weights.
    """

    name: str
    policy: Policy | KeyPolicy | None = None
    heads: Heads | None = None
    change: Change = unchanged
    where: Where = own_span
    protect_bos: bool = False
    vectors: Vectors | None = None
    coefficient: float = 0.0
    positions: Positions = "all"
    inside: Callable[[TransformerBridge], AbstractContextManager[Any]] | None = None


def answered(
    model: TransformerBridge, way: Way, trials: Sequence[Trial], *, batch_size: int = 256
) -> list[Row]:
    """A row for each prompt of the trials: its answer, score and reason, and what it cost.

    ``fluency``: n-gram entropy in bits; ``repeated``: share of the answer that stood in it before;
    ``tokens``: written; ``read``: of the prompt; ``seconds``: an equal share of the time of all.
    """
    asked = [(trial, prompt) for trial in trials for prompt in trial.task.prompts]
    rows, read = [], []
    for trial, prompt in asked:
        changed = way.change(prompt, trial)
        found = way.where(model, prompt, changed)
        edit = None
        if way.policy is not None and found is not None:
            edit = AttentionEdit(found, way.policy, way.heads, protect_bos=way.protect_bos)
        read.append(emphasised_span(model, changed).length)
        rows.append(
            SteeringRow(
                changed.messages,
                way.vectors,
                way.coefficient,
                attention=edit,
                positions=way.positions,
            )
        )
    longest = max(trial.task.max_new_tokens for trial in trials)
    begun = perf_counter()
    with nullcontext() if way.inside is None else way.inside(model):
        answers = generate_steered(model, rows, max_new_tokens=longest, batch_size=batch_size)
    seconds = (perf_counter() - begun) / len(rows)
    found_rows: list[Row] = []
    places = {trial.name: 0 for trial in trials}
    for (trial, prompt), answer, length in zip(asked, answers, read, strict=True):
        verdict = trial.task.judge(prompt, answer)
        found_rows.append(
            {"task": trial.name, "prompt": places[trial.name], "answer": str(answer)}
            | {"score": float(verdict.score), "reason": verdict.reason}
            | {"fluency": ngram_entropy(answer), "repeated": repetition(answer)}
            | {"tokens": len(answer.token_ids), "read": length, "seconds": seconds}
        )
        places[trial.name] += 1
    return found_rows


def prompting(model: TransformerBridge, examples: int, seed: int) -> list[Way]:
    """What a prompt alone can do: nothing, correct examples, marks, repetition."""
    return [
        Way("nothing"),
        Way("few-shot", change=partial(with_examples, model, examples, seed)),
        *(
            Way(name, change=partial(with_mark, mark))
            for name, mark in (
                ("quotes", "quotes"),
                ("asterisks", "stars"),
                ("repeated", "repeated"),
            )
        ),
    ]
