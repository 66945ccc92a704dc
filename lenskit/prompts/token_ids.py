"""Prompts that are given as token ids, for models whose tokens are not text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from lenskit.concepts import Concept
from lenskit.models import pad_left, require_positions
from lenskit.prompts.prompt_set import PromptSet, as_concept

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def prompts_from_ids(
    model: TransformerBridge,
    concept: Concept | str,
    ids: Sequence[Sequence[int]],
    *,
    prefixes: Sequence[tuple[int, int] | None],
    candidates: int | Sequence[tuple[int, int]],
    pair: Sequence[int] | None = None,
    statements: Sequence[str] | None = None,
) -> PromptSet:
    """The prompts that ``ids`` are; no tokenizer is needed.

    ``concept``: a name for what the prefixes activate will do.
    ``prefixes``: between which places of each prompt its prefix stands (``ids[start:stop]``), or
    ``None`` for a prompt without one.
    ``candidates``: how many tokens at the end are the candidate tokens, or between which places of
    each prompt they stand. They must be the same tokens everywhere, behind the prefix. What follows
    them is left out, since a causal model does not look at it.
    ``pair``: for each prompt the index of its partner in the other condition, or -1.
    ``statements``: what the prompts are called.

    Raises ``ValueError`` that names the prompt whose ids, prefix, candidates or partner are wrong,
    and for prompts that are longer than the model's positions.

    >>> ids = [[11, 12, 13, 7, 8], [14, 15, 7, 8]]
    >>> prompts = lk.prompts_from_ids(model, "digits", ids, prefixes=[(0, 2), None], candidates=2)
    >>> prompts.prefix_mask[0]
    tensor([ True,  True, False, False, False])
    """
    rows = [torch.as_tensor(row) for row in ids]
    number = len(rows)
    spans = (
        [(len(row) - candidates, len(row)) for row in rows]
        if isinstance(candidates, int)
        else list(candidates)
    )
    partners = [-1] * number if pair is None else list(pair)
    names = [f"prompt {i}" for i in range(number)] if statements is None else list(statements)
    given = {"prefixes": prefixes, "candidates": spans, "pair": partners, "statements": names}
    for name, each in given.items():
        if len(each) != number or not number:
            raise ValueError(f"{name} must be one for each prompt, got {len(each)} for {number}")
    embedded = model.original_model.get_input_embeddings().weight.shape[0]
    for i, (row, prefix, span) in enumerate(zip(rows, prefixes, spans, strict=True)):
        _require(i, row, prefix, span, embedded)

    kept = [row[:stop].tolist() for row, (_, stop) in zip(rows, spans, strict=True)]
    tokens = pad_left(kept, 0)
    require_positions(model, tokens)
    mask = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for i, prefix in enumerate(prefixes):
        if prefix is not None:
            first = mask.shape[1] - len(kept[i])
            mask[i, first + prefix[0] : first + prefix[1]] = True
    has_prefix = mask.any(dim=1)
    for i, other in enumerate(partners):
        fits = 0 <= other < number and partners[other] == i and has_prefix[other] != has_prefix[i]
        if other != -1 and not fits:
            raise ValueError(
                f"pair of prompt {i} is {other}, which is not its partner: partners name each "
                "other, and one of them has a prefix"
            )
    closing = tuple(str(token) for token in rows[0][slice(*spans[0])].tolist())
    if other := [i for i, (start, stop) in enumerate(spans) if stop - start != len(closing)]:
        raise ValueError(f"candidates of prompt {other[0]} are not {len(closing)} as of prompt 0")
    partner = torch.tensor(partners)
    return PromptSet(as_concept(concept), tokens, mask, has_prefix, closing, tuple(names), partner)


def _require(
    i: int,
    row: Int[Tensor, " pos"],
    prefix: tuple[int, int] | None,
    span: tuple[int, int],
    most: int,
) -> None:
    """Raise unless the parts of prompt ``i`` are ids below ``most``, one behind the other."""
    if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool or not len(row):
        raise ValueError(f"ids of prompt {i} must be whole numbers in a row, got {row.tolist()}")
    if not 0 <= int(row.min()) <= int(row.max()) < most:
        raise ValueError(f"ids of prompt {i} must be from 0 to {most - 1}, got {row.tolist()}")
    start, stop = span
    if not 0 <= start < stop <= len(row):
        raise ValueError(
            f"candidates of prompt {i} must lie within its {len(row)} tokens, got {start} to {stop}"
        )
    if prefix is not None and not 0 <= prefix[0] < prefix[1] <= start:
        raise ValueError(
            f"the prefix of prompt {i} must hold a token and end before its candidate tokens, "
            f"which begin at {start}; got {prefix[0]} to {prefix[1]}"
        )
