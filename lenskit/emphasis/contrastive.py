"""Vectors of the residual stream from pairs of prompts: one that is followed, one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.models import RESID, chat_ids, hooked, run_plain
from lenskit.tasks import TaskPrompt

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Pair = tuple[TaskPrompt, TaskPrompt]


def last_states(
    model: TransformerBridge, prompts: Sequence[TaskPrompt], batch_size: int = 64
) -> Float[Tensor, "prompt block d_model"]:
    """``resid_post`` of every block at each prompt's last token, from which the answer begins."""
    tokens = chat_ids(model, [prompt.messages for prompt in prompts])
    blocks = range(model.cfg.n_layers)
    found = torch.zeros(len(prompts), len(blocks), model.cfg.d_model)
    seen: dict[int, Tensor] = {}

    def read(block: int, value: Tensor, hook: Any) -> None:
        seen[block] = value[:, -1].detach().float().cpu()

    hooks = [(f"blocks.{block}.{RESID}", partial(read, block)) for block in blocks]
    with hooked(model, hooks):
        for rows in torch.arange(len(prompts)).split(batch_size):
            run_plain(model.original_model, tokens.rows(rows).trimmed(), use_cache=False)
            found[rows] = torch.stack([seen[block] for block in blocks], dim=1)
    return found


def mean_difference(
    model: TransformerBridge, pairs: Sequence[Pair]
) -> tuple[Float[Tensor, "block d_model"], Float[Tensor, " block"]]:
    """The mean of the first prompts' last states less that of the second, and their mean norm."""
    clean, corrupt = (last_states(model, [pair[i] for pair in pairs]) for i in (0, 1))
    norms = torch.cat([clean, corrupt]).norm(dim=-1).mean(dim=0)
    return (clean - corrupt).mean(dim=0), norms


def without_span(prompt: TaskPrompt) -> TaskPrompt:
    """The prompt without the line of its span, whose answer is then ``otherwise``.

    The question is emphasised instead. Raises ValueError where the span is not a line of its own.
    """
    start, end = prompt.characters
    text = prompt.messages[prompt.emphasised_in]["content"]
    if text[:start].strip() or text[end : end + 1] != "\n":
        raise ValueError(f"the span {prompt.emphasised!r} is not the first line of {text!r}")
    rest = text[end + 1 :]
    messages = list(prompt.messages)
    messages[prompt.emphasised_in] = {**messages[prompt.emphasised_in], "content": rest}
    last = rest.rsplit("\n", 1)[-1]
    nth = rest.count(last) - 1 or None
    return replace(prompt, messages=tuple(messages), emphasised=last, nth=nth)
