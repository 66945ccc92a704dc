"""What is measured of an answer: a log-probability, a difference of logits, a likeness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.causal.prompts import Read, answer_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NextToken: TypeAlias = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]
Target: TypeAlias = str | Sequence[int] | NextToken


@dataclass(frozen=True)
class Measure:
    """A number for each row, read from the logits at the prompt's end and behind it.

    ``more``: tokens put behind the prompt, so that those after them are measured too. ``read``
    gets the float32 logits at the last ``1 + len(more)`` positions.
    """

    name: str
    more: tuple[int, ...]
    read: Callable[[Float[Tensor, "row pos vocab"]], Float[Tensor, " row"]]

    @property
    def kept(self) -> int:
        """How many of the last positions are read."""
        return 1 + len(self.more)


def measure_of(
    model: TransformerBridge, prompt: Read, target: Target, against: str | Sequence[int] | None
) -> Measure:
    """The measure that ``target`` and ``against`` of ``patch`` stand for, behind this prompt."""
    if callable(target):
        if against is not None:
            raise ValueError("against is for a target that is an answer, not for a function")
        name = getattr(target, "__name__", type(target).__name__)
        return Measure(name, (), lambda logits: target(logits[:, -1]))
    ids = answer_ids(model, prompt, target, "target")
    if against is None:
        return log_probability(ids, f"log-probability of {_said(target)}")
    others = answer_ids(model, prompt, against, "against")
    return logit_difference(ids, others, f"logit of {_said(target)} - logit of {_said(against)}")


def log_probability(answer: tuple[int, ...], name: str) -> Measure:
    """The sum over the answer's tokens of log p(token | prompt and the tokens before it)."""

    def read(logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        wanted = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
        chances = logits.log_softmax(dim=-1).gather(2, wanted[:, :, None])
        return chances[:, :, 0].sum(dim=1)

    return Measure(name, answer[:-1], read)


def logit_difference(one: tuple[int, ...], other: tuple[int, ...], name: str) -> Measure:
    """The difference of two answers' logits where they first differ, behind what they share."""
    pairs = list(zip(one, other, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        raise ValueError("target and against begin alike, so that no token tells them apart")
    a, b = pairs[place]
    return Measure(name, one[:place], lambda logits: logits[:, -1, a] - logits[:, -1, b])


def likeness(source: Float[Tensor, " vocab"]) -> Measure:
    """Minus the Kullback-Leibler divergence KL(source ‖ row) of the next token, in nats."""
    known = source.log_softmax(dim=-1)

    def read(logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        there = known.to(logits.device)
        return (there.exp() * (logits[:, -1].log_softmax(dim=-1) - there)).sum(dim=-1)

    return Measure("-KL(source ‖ patched), next token", (), read)


def _said(answer: str | Sequence[int]) -> str:
    return repr(answer) if isinstance(answer, str) else f"tokens {list(answer)}"
