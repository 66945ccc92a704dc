"""What Hugging Face's model makes of each prompt alone, plain and steered by PyTorch's own hooks.

Neither padding nor a cache nor a bridge is involved: what lenskit's captures and steering must
agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lenskit.models import (
    EVERYTHING,
    Tokens,
    attention_patterns,
    decoder_layers,
    run_plain,
    use_eager_attention,
)
from lenskit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a block's mean residual norm: at one block, and at every block for each of three questions.
STRENGTH = 0.5
STRENGTHS = (0.2, -0.2, 0.1)


@dataclass(frozen=True)
class Alone:
    """What Hugging Face's model makes of each prompt alone, without padding; CPU, float32.

    ``resid_post`` is its own hidden states; that of the last block, which Hugging Face returns
    after the final norm only, is what a forward hook sees the block itself return.
    """

    attention_to_prefix: Float[Tensor, "prompt layer head candidate"]
    resid_post: Float[Tensor, "prompt layer candidate d_model"]
    logits: Float[Tensor, "prompt vocab"]


@dataclass(frozen=True)
class Readings:
    """What Hugging Face's model does with each prompt alone, plain and steered by its own hooks.

    ``directions``: random, as long as the block's residuals are on average. ``steered``: last
    logits with ``STRENGTH`` times the direction added at one block. ``written`` and ``scores``:
    greedy tokens of the questions, steered at every block by ``STRENGTHS``, and their logits.
    """

    prompts: PromptSet
    plain: Alone
    directions: Float[Tensor, "layer d_model"]
    steered: dict[int, Float[Tensor, "prompt vocab"]]
    written: Int[Tensor, "question step"]
    scores: Float[Tensor, "question step vocab"]

    @classmethod
    def read(
        cls, hf_model: PreTrainedModel, prompts: PromptSet, questions: Tokens, steps: int = 8
    ) -> Readings:
        """Run ``hf_model``, which no bridge may have wrapped, and leave it as it was."""
        plain = read_alone(hf_model, prompts)
        _, layers, _, width = plain.resid_post.shape
        drawn = torch.randn(layers, width, generator=torch.Generator().manual_seed(0))
        norms = plain.resid_post.norm(dim=-1).mean(dim=(0, 2))
        directions = norms[:, None] * drawn / drawn.norm(dim=1, keepdim=True)
        steered = {}
        for block in sorted({0, layers // 2, layers - 1}):
            with plain_hooks(hf_model, {block: STRENGTH * directions[block]}):
                steered[block] = read_alone(hf_model, prompts).logits
        additions = [dict(enumerate(strength * directions)) for strength in STRENGTHS]
        written, scores = write_alone(hf_model, questions, additions, steps)
        return cls(prompts, plain, directions, steered, written, scores)


def read_alone(hf_model: PreTrainedModel, prompts: PromptSet) -> Alone:
    """Patterns, residuals and last logits of every prompt, with the candidates of ``prompts``."""
    use_eager_attention(hf_model)
    candidates = len(prompts.candidates)
    masses, states, logits = [], [], []
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        kept[:] = [output[0] if isinstance(output, tuple | list) else output]

    handle = decoder_layers(hf_model)[-1].register_forward_hook(keep)
    try:
        for row in range(len(prompts)):
            alone = prompts.rows([row])
            tokens = alone.tokens.trimmed()
            output = run_plain(hf_model, tokens, **EVERYTHING)
            prefix = alone.prefix_mask[0, -tokens.input_ids.shape[1] :].float()
            patterns = attention_patterns(hf_model, output)
            rows = [pattern[0, :, -candidates:].float().cpu() for pattern in patterns]
            masses.append(torch.stack(rows) @ prefix)
            found = [*output.hidden_states[1:-1], kept[0]]
            states.append(torch.stack([state[0, -candidates:].float().cpu() for state in found]))
            logits.append(output.logits[0, -1].float().cpu())
    finally:
        handle.remove()
    return Alone(torch.stack(masses), torch.stack(states), torch.stack(logits))


def write_alone(
    hf_model: PreTrainedModel,
    tokens: Tokens,
    additions: Sequence[Mapping[int, Float[Tensor, " d_model"]]],
    steps: int,
) -> tuple[Int[Tensor, "prompt step"], Float[Tensor, "prompt step vocab"]]:
    """Greedy tokens of each prompt alone under its additions, and the logits they maximize.

    Neither cache nor padding: the whole text is run anew for each token. No end token stops it.
    """
    written, scores = [], []
    for row, added in enumerate(additions):
        text = tokens.rows([row]).trimmed().input_ids
        length, logits = text.shape[1], []
        with plain_hooks(hf_model, added):
            for _ in range(steps):
                alone = Tokens(text, torch.ones_like(text))
                logits.append(
                    run_plain(hf_model, alone, use_cache=False).logits[0, -1].float().cpu()
                )
                text = torch.cat([text, logits[-1].argmax().view(1, 1)], dim=1)
        written.append(text[0, length:])
        scores.append(torch.stack(logits))
    return torch.stack(written), torch.stack(scores)


@contextmanager
def plain_hooks(
    hf_model: PreTrainedModel, additions: Mapping[int, Float[Tensor, " d_model"]]
) -> Iterator[None]:
    """Add a vector to what some blocks return, by PyTorch's own forward hooks and nothing else."""

    def adder(addition: Tensor) -> Any:
        def add(module: nn.Module, arguments: Any, output: Any) -> Any:
            if isinstance(output, tuple | list):
                return type(output)([output[0] + addition.to(output[0]), *output[1:]])
            return output + addition.to(output)

        return add

    layers = decoder_layers(hf_model)
    handles = [layers[i].register_forward_hook(adder(value)) for i, value in additions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
