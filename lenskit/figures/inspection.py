"""Looking closer: one prompt's tokens and attention, and labels against the true activity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from lenskit.capture import Capture, for_each_pattern
from lenskit.labels import true_activity
from lenskit.prompts import PromptSet

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def token_texts(model: TransformerBridge, prompts: PromptSet, prompt: int = 0) -> list[str]:
    """The tokens of one prompt as text, without padding.

    >>> lk.token_texts(model, prompts, prompt=0)[-5:] == list(prompts.candidates)
    True
    """
    real = prompts.tokens.attention_mask[prompt].bool()
    return [model.tokenizer.decode([token]) for token in prompts.tokens.input_ids[prompt, real]]


def pattern_rows(
    model: TransformerBridge,
    prompts: PromptSet,
    prompt: int = 0,
    *,
    block: int | None = None,
    blocks: Sequence[int] | None = None,
) -> Float[Tensor, "head candidate key"] | Float[Tensor, "block head candidate key"]:
    """Attention from one prompt's candidate tokens to all of its tokens, for ``attention_view``.

    Of one ``block``: ``[head, candidate, key]``. Otherwise of ``blocks``, in increasing order and
    by default all: ``[block, head, candidate, key]``. Raises ValueError for both at once.

    >>> rows = lk.pattern_rows(model, prompts, prompt=0, block=3)
    >>> rows.shape == (model.cfg.n_heads, len(prompts.candidates), prompts.tokens.lengths[0])
    True
    """
    if block is not None and blocks is not None:
        raise ValueError(f"block={block} and blocks={blocks} cannot both be given")
    found: dict[int, Tensor] = {}

    def keep(
        layer: int, rows: Int[Tensor, " prompt"], pattern: Tensor, mask: Bool[Tensor, "prompt key"]
    ) -> None:
        found[layer] = pattern[0].float().cpu()

    wanted = blocks if block is None else [block]
    tokens = prompts.tokens.rows([prompt]).trimmed()
    number = len(prompts.candidates)
    for_each_pattern(model, tokens, number, keep, progress=False, blocks=wanted)
    rows = torch.stack([found[layer] for layer in sorted(found)])
    return rows if block is None else rows[0]


def activity_correlation(
    capture: Capture, labels: Float[Tensor, "prompt layer"]
) -> Float[Tensor, " layer"]:
    """Spearman correlation of labels with the true activity over the prefixed prompts, by block.

    NaN where the labels are constant. Raises ValueError as ``true_activity``.

    >>> labels = lk.soft_labels(capture, lk.select_tokens(capture))
    >>> len(lk.activity_correlation(capture, labels)) == capture.layers
    True
    """
    prefixed = capture.prompts.has_prefix
    truth = true_activity(capture.prompts)[prefixed].numpy()
    columns = labels[prefixed].T.numpy()
    return torch.tensor(
        [
            spearmanr(column, truth).statistic if column.std() > 0 else float("nan")
            for column in columns
        ]
    )
