"""A policy learnt on the prompts that others choose heads by: a bias for every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lenskit._arguments import positive_numbers
from lenskit.attention import AttentionEdit, HeadBias, edited
from lenskit.emphasis.targets import drawn, target_losses
from lenskit.models import using
from lenskit.tasks import Task, emphasised_span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def learn_head_bias(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    outside: bool = True,
    start: float = 1.0,
    steps: int = 40,
    number: int = 8,
    rate: float = 0.2,
    decay: float = 1e-3,
    seed: int = 0,
) -> HeadBias:
    """How far every head should be turned to the span, learnt from the targets of some prompts.

    Profiling tries each head alone at one strength; here the strengths ``b`` of all heads are found
    together by Adam on ``mean loss of the targets + decay Σ b²``, the weights of the model staying
    as they are: ``blocks × heads`` numbers, which begin at ``start`` (``log M`` of InstABoost), and
    as many with ``outside`` (a bias on the rest of the prompt, from 0). Every step draws ``number``
    prompts, of each task in turn; ``rate`` is Adam's, in nats. Learn from prompts of the train
    split, and judge on others. Tasks that must not suffer can be among them.

    Raises ValueError without tasks, and for numbers that cannot be meant.

    >>> train = lk.tasks.embedded("format", 4, split="train", kind="json", length=(0, 0))
    >>> bias = lk.emphasis.learn_head_bias(model, train, steps=2, number=2)
    >>> bias.inside.shape == (model.cfg.n_layers, model.cfg.n_heads)
    True
    """
    (rate,) = positive_numbers("rate", [rate])
    if not math.isfinite(start):
        raise ValueError(f"start must be a finite number, got {start}")
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be a finite number of 0 or more, got {decay}")
    shape, device = (model.cfg.n_layers, model.cfg.n_heads), model.cfg.device
    biases = [torch.full(shape, each, device=device) for each in (start, 0.0)[: 1 + outside]]
    biases = [each.requires_grad_(True) for each in biases]
    optimiser = torch.optim.Adam(biases, lr=rate)
    with using(model), torch.enable_grad():
        for prompts in drawn(tasks, steps, number, seed):
            policy = HeadBias(*biases)
            spans = [emphasised_span(model, prompt) for prompt in prompts]
            with edited(model, [AttentionEdit(span, policy) for span in spans]):
                loss = target_losses(model, prompts).mean()
            loss = loss + decay * sum(each.square().sum() for each in biases)
            for each, gradient in zip(biases, torch.autograd.grad(loss, biases), strict=True):
                each.grad = gradient
            optimiser.step()
    return HeadBias(*(each.detach().cpu() for each in biases))
