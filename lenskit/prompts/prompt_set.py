"""Prompts with and without a concept's prefix, as tokens in which every part is located."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit._display import Displayed, count, quoted, spread
from lenskit.concepts import Concept
from lenskit.models import Tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Rows = Int[Tensor, " row"] | Bool[Tensor, " prompt"] | Sequence[int]


@dataclass(frozen=True, repr=False)
class PromptSet(Displayed):
    """Prompts of one concept, left padded; all of them end in the same candidate tokens.

    ``prefix_mask`` is true on the prefix tokens (nowhere in a prompt without prefix).
    ``candidates`` are the closing tokens of the template in text order, the last one token -1.
    ``pair``: the index of the prompt with the same statement in the other condition, or -1.
    """

    concept: Concept
    tokens: Tokens
    prefix_mask: Bool[Tensor, "prompt pos"]
    has_prefix: Bool[Tensor, " prompt"]
    candidates: tuple[str, ...]
    statements: tuple[str, ...]
    pair: Int[Tensor, " prompt"]

    def __post_init__(self) -> None:
        if self.prefix_mask.shape != self.tokens.input_ids.shape:
            raise ValueError(
                f"prefix_mask must have the shape of the tokens, "
                f"{tuple(self.tokens.input_ids.shape)}; got {tuple(self.prefix_mask.shape)}"
            )
        closing = self.tokens.input_ids[:, -len(self.candidates) :]
        if not self.candidates or bool((closing != closing[:1]).any()):
            raise ValueError(
                f"the prompts do not all end in the {len(self.candidates)} candidate tokens "
                f"{self.candidates}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def _headline(self) -> str:
        return f"PromptSet of {self.concept.name!r}, {count(len(self), 'prompt')}"

    def _rows(self) -> dict[str, object]:
        spans = self.prefix_mask[self.has_prefix].sum(dim=1)
        return {
            "prefix": self.concept.prefix,
            "with it": count(int(self.has_prefix.sum()), "prompt"),
            "prefix tokens": spread(spans.tolist()),
            "tokens": f"prompt {len(self)} × pos {self.tokens.input_ids.shape[1]}",
            "lengths": spread(self.tokens.lengths.tolist()),
            "candidates": quoted(self.candidates),
            "pairs": int((self.pair >= 0).sum()) // 2,
            "statements": quoted(self.statements[:2]),
        }

    def rows(self, index: Rows) -> PromptSet:
        """Some of the prompts, in the order of ``index`` (a mask keeps theirs).

        A prompt whose partner is left out has the pair -1.
        """
        rows = row_index(index, len(self))
        # The last place stands for -1, «no partner», which must stay -1.
        place = torch.full((len(self) + 1,), -1, dtype=torch.long)
        place[rows] = torch.arange(len(rows))
        return PromptSet(
            self.concept,
            self.tokens.rows(rows),
            self.prefix_mask[rows],
            self.has_prefix[rows],
            self.candidates,
            tuple(self.statements[row] for row in rows.tolist()),
            place[self.pair[rows]],
        )


def with_separator(model: TransformerBridge, prompts: PromptSet) -> PromptSet:
    """The same prompts, whose prefix also spans the tokens of the white space after it.

    AGS's own code counts them: its span runs up to the first token of the statement prompt.
    """
    mask = prompts.prefix_mask.clone()
    for ids, row in zip(prompts.tokens.input_ids, mask, strict=True):
        place = int(row.nonzero()[-1]) + 1 if bool(row.any()) else len(row)
        # Beside the token before it, since a tokenizer may drop a space that opens a text.
        while place < len(row):
            last = model.tokenizer.decode(ids[place - 1 : place])
            both = model.tokenizer.decode(ids[place - 1 : place + 1])
            if not both.startswith(last) or both[len(last) :].strip():
                break
            row[place] = True
            place += 1
    return replace(prompts, prefix_mask=mask)


def row_index(index: Rows, length: int) -> Int[Tensor, " row"]:
    """Indices from indices or from a mask over ``length`` prompts; negative ones from the end."""
    rows = torch.as_tensor(index)
    if rows.dtype == torch.bool:
        if rows.shape != (length,):
            raise ValueError(f"a mask over {length} prompts was expected, got {tuple(rows.shape)}")
        return rows.nonzero().flatten()
    if rows.numel() and (rows.is_floating_point() or rows.is_complex()):
        raise ValueError(f"rows must be whole numbers or a mask, got {rows.tolist()}")
    rows = rows.long().flatten()
    if bool(((rows < -length) | (rows >= length)).any()):
        raise IndexError(f"rows must be from 0 to {length - 1}, got {rows.tolist()}")
    return rows % max(length, 1)


def as_concept(concept: Concept | str) -> Concept:
    """A concept as it is, or the one that a prefix activates."""
    if isinstance(concept, str):
        return Concept(prefix=concept)
    if not isinstance(concept, Concept):
        raise TypeError(f"concept must be a Concept or the text of its prefix, got {concept!r}")
    return concept
