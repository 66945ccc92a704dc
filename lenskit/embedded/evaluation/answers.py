"""Answers of a checkpoint, by ``transformers`` alone: greedy, or after a sampled first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor
from transformers import LogitsProcessor

Conversation = Sequence[Mapping[str, str]]


class _SampledFirst(LogitsProcessor):
    """Leaves one token for the first step, drawn from the likeliest that hold ``nucleus``."""

    def __init__(self, nucleus: float, generator: torch.Generator) -> None:
        self.nucleus, self.generator, self.begun = nucleus, generator, False

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]):
        if self.begun:
            return scores
        self.begun = True
        shares, order = scores.float().softmax(-1).sort(-1, descending=True)
        inside = shares.cumsum(-1) - shares < self.nucleus
        drawn = torch.multinomial(shares * inside, 1, generator=self.generator)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, order.gather(1, drawn), 0.0)


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    *,
    nucleus: float | None = None,
    seed: int = 0,
    batch: int = 256,
    what: str = "",
) -> list[str]:
    """The model's answers to user messages or conversations, of at most 64 tokens.

    Greedy, or with ``nucleus`` after a sampled first token. That token decides whether an answer
    is neutral. It is drawn at temperature 1 from the fewest tokens that hold this much probability,
    1 being all of them; sampling the rest of the answer as well would only add slips of the pen.
    """
    conversations = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    length = [sum(len(message["content"]) for message in each) for each in conversations]
    order = sorted(range(len(prompts)), key=length.__getitem__)
    texts = [""] * len(prompts)
    generator = torch.Generator(model.device).manual_seed(seed)
    for start in track(range(0, len(order), batch), description=what, transient=True):
        chosen = order[start : start + batch]
        inputs = tokenizer.apply_chat_template(
            [conversations[i] for i in chosen],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        processors = [] if nucleus is None else [_SampledFirst(nucleus, generator)]
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=64, logits_processor=processors
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        found = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, found, strict=True):
            texts[i] = text
    return texts
