"""Which label a model finds likeliest as the answer to a prompt, by one forward pass a row.

As published a label stands for its first token, so that labels that share it cannot be told apart;
mended, the whole label counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._arguments import whole
from lenskit.embedded.tasks import TaskPrompt
from lenskit.models import Tokens, chat_ids, require_positions, rows_of, run_plain
from lenskit.tasks.task import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

By = Literal["whole", "first"]


@dataclass(frozen=True)
class _Row:
    """One row of a forward pass: a prompt, what stands behind it, and the labels it scores."""

    prompt: int
    tail: tuple[int, ...]
    labels: list[int]


@torch.no_grad()
def label_log_probs(
    model: TransformerBridge,
    prompts: Sequence[TaskPrompt],
    labels: Sequence[Sequence[str]],
    *,
    by: By = "whole",
    before: str = "",
    ending: str = "",
    batch_size: int = 64,
    template_arguments: Mapping[str, Any] | None = None,
) -> Float[Tensor, "prompt label"]:
    """Log-probability, in nats, of each prompt's labels as the beginning of its answer.

    ``labels``: as many for each prompt. Scored is ``before + label + ending``, tokenized by itself
    as an answer is: all of it by "whole", its first token alone by "first". Bare text needs
    ``before=" "`` where words carry the blank before them. What steers the model steers these
    passes too, each prompt with its own row. Raises ValueError for labels without tokens, and for
    prompts whose labels are not as many.

    >>> prompts = lk.tasks.embedded("count", 2, exercises=1).prompts
    >>> lk.tasks.label_log_probs(model, prompts, [["1", "2", "3"]] * 2).shape
    torch.Size([2, 3])
    """
    if by not in ("whole", "first"):
        raise ValueError(f"by={by!r} must be 'whole' or 'first'")
    batch_size = whole("batch_size", batch_size, 1)
    sizes = {len(each) for each in labels}
    if not prompts or len(labels) != len(prompts) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"labels: give each of the {len(prompts)} prompts as many, and one at least; "
            f"got {len(labels)} lists of {sorted(sizes)}"
        )
    ids = {
        label: _ids(model, before + label + ending)
        for label in dict.fromkeys(label for each in labels for label in each)
    }
    tokens = chat_ids(
        model, [prompt.messages for prompt in prompts], template_arguments=template_arguments
    )
    scored = [[ids[label][: 1 if by == "first" else None] for label in each] for each in labels]
    # Labels that differ in their last token alone share a row, which ends before it.
    rows = [
        _Row(i, tail, [j for j, label in enumerate(own) if label[:-1] == tail])
        for i, own in enumerate(scored)
        for tail in dict.fromkeys(label[:-1] for label in own)
    ]
    # Rows of a batch have equally long tails, so that no padding stands behind a prompt.
    lengths = tokens.lengths.tolist()
    rows.sort(key=lambda row: (len(row.tail), lengths[row.prompt]))
    out = torch.zeros(len(prompts), len(labels[0]))
    with rows_of(model, len(prompts), "prompts") as edits:
        for _, group in groupby(rows, lambda row: len(row.tail)):
            alike = list(group)
            for start in range(0, len(alike), batch_size):
                part = alike[start : start + batch_size]
                own = torch.tensor([row.prompt for row in part])
                for edit in edits:
                    edit.batch(own)
                tails = torch.tensor([row.tail for row in part]).long()
                logits = _logits(model, tokens.rows(own).trimmed(), tails)
                at = [
                    (r, k, token, row.prompt, j)
                    for r, row in enumerate(part)
                    for j in row.labels
                    for k, token in enumerate(scored[row.prompt][j])
                ]
                r, k, token, i, j = torch.tensor(at).T
                values = (logits[r, k, token] - logits.logsumexp(-1)[r, k]).cpu()
                out.index_put_((i, j), values, accumulate=True)
    if bool(out.isnan().any()):
        raise ValueError(
            "the model's logits are not numbers; a smaller coefficient or another dtype may help"
        )
    return out


def choose(
    model: TransformerBridge,
    task: Task,
    *,
    by: By = "whole",
    before: str = "",
    ending: str = "",
    batch_size: int = 64,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """The likeliest label for each prompt, as its answer; options as in ``label_log_probs``.

    Labels are the task's, or the prompt's ``target`` and ``otherwise``. Of equally likely ones the
    last is taken, but never the target where another is as likely: efficacy counts p(new) > p(true)
    alone. By "first" this is the published score (top-1 of Bias in Bios, ES and PS of CounterFact);
    "whole" compares whole labels. Raises ValueError for a prompt with one label, and by "whole"
    where a label's tokens begin another's, which then can never win: an ``ending`` such as ``"."``
    sets them apart.

    >>> from dataclasses import replace
    >>> task = lk.tasks.embedded("count", 4, exercises=1)
    >>> task = replace(task, labels=("1", "2", "3"))
    >>> set(lk.tasks.choose(model, task)) <= {"1", "2", "3"}
    True
    """
    labels = [task.labels or (prompt.target, prompt.otherwise) for prompt in task.prompts]
    for prompt, own in zip(task.prompts, labels, strict=True):
        if len({*own} - {""}) < 2:
            raise ValueError(
                f"the prompt {prompt.messages[-1]['content']!r} has {own} to choose from; "
                "give the task labels, or prompts with otherwise"
            )
    if by == "whole":
        for own in dict.fromkeys(labels):
            _refuse_beginnings(model, own, before, ending)
    log_probs = label_log_probs(
        model,
        task.prompts,
        labels,
        by=by,
        before=before,
        ending=ending,
        batch_size=batch_size,
        template_arguments=template_arguments,
    )
    chosen = []
    for prompt, own, row in zip(task.prompts, labels, log_probs.tolist(), strict=True):
        best = [label for label, value in zip(own, row, strict=True) if value == max(row)]
        others = [label for label in best if label != prompt.target]
        chosen.append((others or best)[-1])
    return chosen


def _logits(
    model: TransformerBridge, prompts: Tokens, tails: Int[Tensor, "row tail"]
) -> Float[Tensor, "row pos vocab"]:
    """From each prompt's last token to the end of its tail; float32, on the model's device."""
    require_positions(model, prompts, more=tails.shape[1])
    both = Tokens(
        torch.cat([prompts.input_ids, tails], dim=1),
        torch.cat([prompts.attention_mask, torch.ones_like(tails)], dim=1),
    )
    logits = run_plain(model.original_model, both, use_cache=False).logits
    return logits[:, -tails.shape[1] - 1 :].float()


def _ids(model: TransformerBridge, text: str) -> tuple[int, ...]:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the label {text!r} has no tokens; leave it out")
    return tuple(ids)


def _refuse_beginnings(
    model: TransformerBridge, labels: Sequence[str], before: str, ending: str
) -> None:
    ids = sorted((_ids(model, before + label + ending), label) for label in {*labels})
    for (short, name), (long, other) in zip(ids, ids[1:], strict=False):
        if long[: len(short)] == short:
            raise ValueError(
                f"the label {name!r} begins the label {other!r}, which could never be likelier; "
                "give an ending that closes a label, such as ending='.'"
            )
