"""The loss of a task's target answers behind its prompts, for whatever learns from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit.decoding import end_tokens
from lenskit.models import Tokens, chat_ids, pad_left
from lenskit.tasks import Task, TaskPrompt

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def with_targets(
    model: TransformerBridge, prompts: Sequence[TaskPrompt]
) -> tuple[Tokens, Bool[Tensor, "row pos"]]:
    """Each prompt with its target and an end token, and which of the tokens are the answer's."""
    asked = chat_ids(model, [prompt.messages for prompt in prompts])
    own, ends = model.tokenizer.eos_token_id, end_tokens(model)
    end = [own] if own in ends else list(ends[:1])
    ids, lengths = [], []
    for row, mask, prompt in zip(asked.input_ids, asked.attention_mask, prompts, strict=True):
        said = [*model.tokenizer(prompt.target, add_special_tokens=False)["input_ids"], *end]
        ids.append([*row[mask.bool()].tolist(), *said])
        lengths.append(len(said))
    tokens = pad_left(ids, model.tokenizer.pad_token_id)
    places = torch.arange(tokens.input_ids.shape[1], 0, -1)
    return tokens, places <= torch.tensor(lengths)[:, None]


def target_losses(
    model: TransformerBridge, prompts: Sequence[TaskPrompt]
) -> Float[Tensor, " prompt"]:
    """Mean loss of each prompt's target and end token, in nats a token, with what steers it now.

    Gradients flow where they are enabled.
    """
    tokens, wanted = with_targets(model, prompts)
    tokens = tokens.to(model.cfg.device)
    logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        tokens.input_ids[:, 1:].to(logits.device),
        reduction="none",
    )
    asked = wanted[:, 1:].to(loss)
    return (loss * asked).sum(dim=1) / asked.sum(dim=1)


def drawn(
    tasks: Task | Sequence[Task], steps: int, number: int, seed: int
) -> Iterator[list[TaskPrompt]]:
    """For each of ``steps`` at most ``number`` prompts of all tasks, each task as often.

    Every prompt of a task is drawn before any is drawn again.
    """
    given = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not given:
        raise ValueError("tasks is empty; give at least one, such as lk.tasks.embedded('format')")
    steps, number = whole("steps", steps, 1), whole("number", number, 1)
    random = Random(seed)
    waiting: dict[int, list[TaskPrompt]] = {}
    place = 0
    for _ in range(steps):
        some = []
        for _ in range(number):
            if not waiting.get(place):
                waiting[place] = random.sample(given[place].prompts, len(given[place]))
            some.append(waiting[place].pop())
            place = (place + 1) % len(given)
        yield some
