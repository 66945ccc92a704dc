"""What replaces the activations of a site: another prompt's, a mean, noise, or a function's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed
from lenskit.causal.prompts import Prompt, read_prompt
from lenskit.causal.runs import activations

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Replace: TypeAlias = Callable[[int, Float[Tensor, "pos *width"]], Float[Tensor, "pos *width"]]


@dataclass(frozen=True, repr=False)
class Mean(Displayed):
    """Mean ablation: a site gets the mean of its block's activations over these prompts.

    Over all their tokens but the first of each, on which attention rests and whose activations
    are far larger. With ``by_position`` the mean at the same position; the prompts must then have
    as many tokens as the patched one.
    """

    prompts: Sequence[Prompt]
    by_position: bool = False


@dataclass(frozen=True, repr=False)
class Noise(Displayed):
    """Noise ablation: Gaussian noise is added to a site, ``scale`` standard deviations strong.

    The standard deviation is that of the block's activations over the prompt's tokens but the
    first. A source is a function of the block and its activations, as this one is; the noise
    depends on ``seed``, block and position alone.
    """

    scale: float = 1.0
    seed: int = 0

    def __call__(
        self, block: int, values: Float[Tensor, "pos *width"]
    ) -> Float[Tensor, "pos *width"]:
        seed = 1_000_003 * self.seed + block
        drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
        spread = values[1:].float().std() if len(values) > 1 else values.float().std()
        return values + self.scale * spread * drawn.to(values)


Source: TypeAlias = Prompt | Mean | Replace


def mean_values(
    model: TransformerBridge, mean: Mean, at: str, length: int, batch_size: int
) -> Float[Tensor, "block pos *width"]:
    """The mean's values for each block and position of a prompt of ``length`` tokens."""
    if isinstance(mean.prompts, str) or not len(mean.prompts):
        raise ValueError(f"Mean needs a list of prompts, got {mean.prompts!r}")
    rows = [read_prompt(model, prompt, "a prompt of Mean") for prompt in mean.prompts]
    lengths = {len(row) for row in rows}
    if mean.by_position and lengths != {length}:
        raise ValueError(
            f"Mean by position needs prompts of {length} tokens, as the patched one has, got "
            f"{sorted(lengths)}"
        )
    if lengths == {1}:
        raise ValueError("Mean leaves out each prompt's first token, and these have no other")
    sums: dict[int, Tensor] = {}

    def add(row: int, values: Tensor, logits: Tensor) -> None:
        # By row, since a batch may be run again after out-of-memory.
        own = values if mean.by_position else values[:, 1:]
        sums[row] = own.double() if mean.by_position else own.double().sum(1, keepdim=True)

    activations(model, rows, at, add, batch_size=batch_size)
    number = len(rows) if mean.by_position else sum(len(row) - 1 for row in rows)
    found = (sum(sums.values(), torch.tensor(0.0)) / number).float()
    return found.expand(-1, length, *found.shape[2:])
