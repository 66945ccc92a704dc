"""How far a vector makes the answers likely that the model gives when it is told the concept.

No judge is needed, and nothing is generated for each coefficient: one forward pass an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed, count, quoted
from lenskit.concepts import question_prompt
from lenskit.generation import generate
from lenskit.intervention import Positions
from lenskit.models import chat_ids
from lenskit.study.divergence import Unsteered, log_probs_along

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import Vectors


@dataclass(frozen=True, repr=False)
class Told(Displayed):
    """Answers that a model gives when the prefix stands before the questions.

    ``log_prob``: their mean log-probability with the prefix, in nats a token; ``plain``: without
    it. ``base``: each question without the prefix and its answer.
    """

    prefix: str
    answers: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...] = field(repr=False)
    base: Unsteered = field(repr=False)
    log_prob: float
    plain: float

    def _headline(self) -> str:
        return f"Answers to {count(len(self.answers), 'question')} after {self.prefix!r}"

    def _rows(self) -> dict[str, object]:
        return {
            "answers": quoted(self.answers),
            "with the prefix": f"{self.log_prob:.3f} nats a token",
            "without": f"{self.plain:.3f} nats a token",
        }

    @property
    def gap(self) -> float:
        """What the prefix makes of them, in nats a token."""
        return self.log_prob - self.plain


def told(
    model: TransformerBridge,
    prefix: str,
    questions: Iterable[str],
    *,
    max_new_tokens: int = 30,
    batch_size: int = 64,
) -> Told:
    """Greedy answers after the prefix, and how likely they are with it and without it.

    Call it outside ``steer``. Raises ValueError without questions, and where all answers are empty.
    """
    asked = tuple(questions)
    if not asked:
        raise ValueError("questions is empty; give at least one")
    with_prefix = [question_prompt(each, prefix) for each in asked]
    answers = generate(model, with_prefix, max_new_tokens=max_new_tokens, batch_size=batch_size)
    kept = [i for i, answer in enumerate(answers) if answer.token_ids]
    if not kept:
        raise ValueError(f"the model's answers after the prefix {prefix!r} are all empty")
    targets = tuple(answers[i].token_ids for i in kept)
    parts = {
        name: _base(model, [texts[i] for i in kept], targets)
        for name, texts in (("plain", asked), ("told", with_prefix))
    }
    read = partial(_mean_log_prob, targets)
    means = {
        name: float(torch.stack(log_probs_along(model, base, batch_size, read=read)).mean())
        for name, base in parts.items()
    }
    texts = tuple(str(answers[i]) for i in kept)
    return Told(prefix, texts, targets, parts["plain"], means["told"], means["plain"])


def lift(
    model: TransformerBridge,
    answers: Told,
    vectors: Sequence[Vectors],
    coefficients: Sequence[float],
    positions: Sequence[Positions] | Positions = "all",
    *,
    relative: bool | None = None,
    batch_size: int = 64,
) -> Float[Tensor, " way"]:
    """How much of what the prefix does to its own answers each way to steer does without it.

    ``(steered - plain) / (prefixed - plain)`` of the answers' mean log-probability: 0 where
    steering changes nothing, 1 where it does as much as the prefix, negative where it makes them
    less likely. NaN where the prefix itself makes them no likelier.
    """
    where = [positions] * len(vectors) if isinstance(positions, str) else list(positions)
    number = len(answers.targets)
    steered = [
        (one, coefficient, each)
        for one, coefficient, each in zip(vectors, coefficients, where, strict=True)
        for _ in range(number)
    ]
    if not steered:
        return torch.empty(0)
    read = partial(_mean_log_prob, answers.targets)
    found = log_probs_along(model, answers.base, batch_size, steered, relative, read=read)
    means = torch.stack(found).view(-1, number).mean(dim=1)
    if answers.gap <= 0:
        return torch.full_like(means, float("nan"))
    return (means - answers.plain) / answers.gap


def _base(
    model: TransformerBridge, questions: Sequence[str], targets: Sequence[Sequence[int]]
) -> Unsteered:
    prompts = chat_ids(model, [[{"role": "user", "content": each}] for each in questions])
    ids, lengths = [], []
    for row, mask, target in zip(prompts.input_ids, prompts.attention_mask, targets, strict=True):
        prompt = row[mask.bool()].tolist()
        ids.append((*prompt, *target[:-1]))
        lengths.append(len(prompt))
    return Unsteered(tuple(questions), tuple(ids), tuple(lengths), ())


def _mean_log_prob(
    targets: Sequence[Sequence[int]], row: int, log_probs: Float[Tensor, "token vocab"]
) -> Float[Tensor, ""]:
    """Of the row's own tokens; the targets take turns."""
    target = torch.tensor(targets[row % len(targets)])
    return log_probs.gather(1, target[:, None]).mean()
