"""What prompts begin with alike is run once: its keys and values serve all of them.

The prompts of one concept differ in their statements alone, so that more than half of their tokens
are the same, at the same positions. A causal model computes the same of them every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from lenskit.models.reference import probe_tokens
from lenskit.models.templates import Tokens, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer tokens, or a smaller share of them, are not worth a pass of their own.
FEWEST = 8
SHARE = 0.25
# Fewer prompts that begin alike do not make a batch of their own.
GROUP = 16


class Start(DynamicCache):
    """Keys and values of the tokens that prompts begin with, one row for all of them.

    While ``complete`` is false it is filled. Then what a block adds comes back behind them, and is
    not kept.
    """

    complete = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that the block's queries may see."""
        if not self.complete:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        own = self.layers[layer_idx]

        def behind(start: Tensor, new: Tensor) -> Tensor:
            return torch.cat([start.expand(len(new), -1, -1, -1), new], dim=-2)

        return behind(own.keys, key_states), behind(own.values, value_states)


def left_aligned(tokens: Tokens) -> Int[Tensor, "prompt pos"]:
    """The ids with each prompt's padding behind it."""
    width = tokens.input_ids.shape[1]
    places = torch.arange(width, device=tokens.input_ids.device)
    return tokens.input_ids.gather(1, (places + (width - tokens.lengths)[:, None]) % width)


def common_start(ids: Int[Tensor, "prompt pos"], limit: int) -> int:
    """How many tokens, ``limit`` at most, all of these left-aligned prompts begin with alike."""
    alike = (ids[:, :limit] == ids[:1, :limit]).all(dim=0)
    return int(alike.long().cumprod(dim=0).sum())


def worth_sharing(ids: Int[Tensor, "prompt pos"], limit: int) -> int:
    """``common_start`` where running it once saves something, else 0."""
    number = common_start(ids, limit)
    return number if len(ids) > 1 and number >= max(FEWEST, SHARE * ids.shape[1]) else 0


def probes(tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """Two prompts of different lengths that begin alike, to try a model on."""
    tokens = probe_tokens(tokenizer)
    rows = zip(tokens.input_ids, tokens.attention_mask.bool(), strict=True)
    short, long = sorted((ids[real] for ids, real in rows), key=len)
    other = torch.cat([long[: len(long) // 2], short[len(short) // 2 :]])
    padding = 0 if tokenizer is None else tokenizer.pad_token_id
    return pad_left([long.tolist(), other.tolist()], padding)


def batches(tokens: Tokens, batch_size: int) -> list[Int[Tensor, " row"]]:
    """Prompts that begin alike together, then those of similar length; the longest batch first.

    The first batch then needs the most memory: what fits it fits the rest.
    """
    lengths = tokens.lengths
    half = left_aligned(tokens)[:, : max(1, int(lengths.min()) // 2)]
    _, group, sizes = half.unique(dim=0, return_inverse=True, return_counts=True)
    # Groups that are too small go together.
    group = torch.where(sizes[group] < GROUP, -1, group)
    found: list[Tensor] = []
    for own in group.unique():
        rows = (group == own).nonzero()[:, 0]
        rows = rows[lengths[rows].argsort(descending=True, stable=True)]
        found += rows.tensor_split(-(-len(rows) // batch_size))
    return sorted(found, key=lambda rows: -int(lengths[rows[0]]))


def tokens_run(tokens: Tokens, batch_size: int, candidates: int, *, shared: bool) -> int:
    """How many tokens the model computes, padding included, what is shared once a batch."""
    number = 0
    for rows in batches(tokens, batch_size):
        some = tokens.rows(rows).trimmed()
        ids, limit = left_aligned(some), int(some.lengths.min()) - candidates
        start = worth_sharing(ids, limit) if shared else 0
        number += start + len(ids) * (ids.shape[1] - start)
    return number
