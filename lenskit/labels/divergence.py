"""Labels from what the prefix does to the model's next token: no attention, no truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.concepts import statement_prompt
from lenskit.models import Tokens, chat_ids, in_batches, next_logits, pad_left, using
from lenskit.prompts import PromptSet, with_separator
from lenskit.selector import TokenSelection

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def next_token_divergence(
    model: TransformerBridge, prompts: PromptSet, *, batch_size: int = 64
) -> Float[Tensor, " prompt"]:
    """KL(with the prefix ‖ without it) of the next token after each prompt, in nats.

    0 for a prompt without a prefix. Beside the others the prompt about the same statement is run,
    or of prompts that ``build_prompts`` did not make the same tokens without the prefix. It says
    where the prefix makes a difference: a concept that is not active in a prompt leaves the next
    token as it is. Call it outside ``steer``.

    >>> moved = lk.next_token_divergence(model, prompts)
    >>> bool((moved[~prompts.has_prefix] == 0).all()), bool((moved >= 0).all())
    (True, True)
    """
    rows = prompts.has_prefix.nonzero()[:, 0]
    moved = torch.zeros(len(prompts))
    if len(rows):
        prefixed = prompts.rows(rows)
        pairs = pad_left([*_ids(prefixed.tokens), *_without_prefix(model, prefixed)], 0)
        with_it, without = _next_log_probs(model, pairs, batch_size).chunk(2)
        chances = with_it.exp()
        gained = torch.where(chances > 0, chances * (with_it - without), 0.0)
        # Of equal distributions rounding may leave less than none.
        moved[rows] = gained.sum(dim=-1).clamp(min=0)
    return moved


def divergence_labels(
    capture: Capture,
    tokens: TokenSelection | None = None,
    *,
    model: TransformerBridge | None = None,
) -> Float[Tensor, "prompt layer"]:
    """``next_token_divergence`` of each prompt over the largest, the same at every block.

    ``tokens`` is not used, but must fit. Raises ValueError without the ``model``, and where the
    prefix moves no prompt's next token.

    >>> labels = lk.divergence_labels(capture, model=model)
    >>> float(labels.min()), float(labels.max())
    (0.0, 1.0)
    """
    if tokens is not None:
        tokens.check(capture.candidates, capture.layers)
    if model is None:
        raise ValueError("labels 'divergence' are measured on the model; give model=model")
    moved = next_token_divergence(model, capture.prompts)
    if not float(moved.max()) > 0:
        raise ValueError("the prefix moves the next token of no prompt, so there is no label")
    return (moved / moved.max())[:, None].expand(-1, capture.layers).clone()


def _without_prefix(model: TransformerBridge, prompts: PromptSet) -> list[list[int]]:
    """The ids of the same prompts without their prefix."""
    prefix = prompts.concept.prefix.strip()
    if model.tokenizer is not None:
        # A first word may have another token where something stands before it.
        if _asked(model, prompts.statements, prefix) == _ids(prompts.tokens):
            return _asked(model, prompts.statements, "")
        prompts = with_separator(model, prompts)
    kept = prompts.tokens.attention_mask.bool() & ~prompts.prefix_mask
    return [ids[own].tolist() for ids, own in zip(prompts.tokens.input_ids, kept, strict=True)]


def _asked(model: TransformerBridge, statements: Sequence[str], prefix: str) -> list[list[int]]:
    """The ids of prompts about these statements, as ``build_prompts`` makes them."""
    asked = [statement_prompt(one, prefix).strip() for one in statements]
    return _ids(chat_ids(model, [[{"role": "user", "content": each}] for each in asked]))


def _ids(tokens: Tokens) -> list[list[int]]:
    """The ids of each row without its padding."""
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
    ]


@torch.no_grad()
def _next_log_probs(
    model: TransformerBridge, tokens: Tokens, batch_size: int
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities of each row's next token, float32 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(tokens)

    def run(rows: Tensor) -> None:
        logits = next_logits(model, tokens.rows(rows))
        for row, own in zip(rows.tolist(), logits.float().log_softmax(dim=-1).cpu(), strict=True):
            found[row] = own

    with using(model):
        in_batches(tokens, batch_size, run, progress=False, description="Next tokens")
    return torch.stack(found)
