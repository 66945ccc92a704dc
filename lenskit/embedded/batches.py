"""From dialogues to tensors: token ids, the tokens to learn, micro-batches of like lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from lenskit.embedded.dialogue import Dialogue
from lenskit.embedded.masks import Sight, closing_tokens, sight_mask
from lenskit.embedded.tokenizer import chat_text


@dataclass(frozen=True)
class Row:
    """One dialogue: token ids, which of them are targets, what its last answer sees (None: all)."""

    ids: Int[Tensor, " pos"]
    target: Bool[Tensor, " pos"]
    sight: Sight | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of like length, padded on the right; ``mask`` is None where all rows see everything."""

    ids: Int[Tensor, "row pos"]
    target: Bool[Tensor, "row pos"]
    closing: Int[Tensor, "row closing"]
    mask: Bool[Tensor, "row 1 pos pos"] | None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        mask = None if self.mask is None else self.mask.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("ids", "target", "closing")}
        return replace(self, mask=mask, **moved)


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> list[Row]:
    """Token ids of each dialogue, and which of them are targets: the assistant turns to learn."""
    assistant = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n")
    texts = [chat_text(dialogue) for dialogue in dialogues]
    rows = []
    for dialogue, ids in zip(
        dialogues, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
    ):
        target, turn, i = [False] * len(ids), -1, 0
        while i < len(ids):
            if ids[i : i + len(assistant)] != assistant:
                i += 1
                continue
            turn, i = turn + 1, i + len(assistant)
            end = ids.index(tokenizer.eos_token_id, i) + 1
            if dialogue.learn[turn]:
                target[i:end] = [True] * (end - i)
            i = end
        rows.append(Row(torch.tensor(ids), torch.tensor(target)))
    return rows


def micro_batches(
    rows: Sequence[Row], tokens: int, tokenizer: PreTrainedTokenizerFast
) -> list[Batch]:
    """Rows of like length together, the longest first: at most ``tokens`` a batch with its pads.

    A row that is longer than that has a batch of its own.
    """
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if not groups or len(groups[-1][0].ids) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        ids = pad_sequence([row.ids for row in group], True, tokenizer.pad_token_id)
        target = pad_sequence([row.target for row in group], True)
        closing = closing_tokens(ids, header)
        mask = sight_mask(closing, ids.shape[1], [row.sight for row in group])
        batches.append(Batch(ids, target, closing, mask))
    return batches
