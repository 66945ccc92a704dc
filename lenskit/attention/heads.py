"""Sets of attention heads, read and written in the form of PASTA's head configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit._display import Displayed, count
from lenskit._files import read_json

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class Heads(Displayed):
    """A set of heads as ``(block, head_index)`` pairs, with the operations of a set.

    ``Heads({3: [0, 5], 4: [1]})`` by block, ``Heads([(3, 0), (3, 5), (4, 1)])`` by pairs,
    ``Heads.all(model)`` for every head (of some blocks). Raises ValueError for what is no whole
    number of 0 or more.

    >>> heads = lk.Heads({1: [0, 2], 3: [1]}) | lk.Heads([(1, 3)])
    >>> len(heads), (1, 3) in heads, heads.by_block()
    (4, True, {1: (0, 2, 3), 3: (1,)})
    """

    pairs: frozenset[tuple[int, int]]

    def __init__(self, heads: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] = ()) -> None:
        if not isinstance(heads, Iterable):
            raise ValueError(
                f"heads must be {{block: [heads]}} or (block, head) pairs; got {heads!r}"
            )
        given: list[tuple[int, int]] = []
        if isinstance(heads, Mapping):
            for block, some in heads.items():
                if isinstance(some, str) or not isinstance(some, Iterable):
                    raise ValueError(f"heads[{block!r}] must be a list of heads, got {some!r}")
                given += [(block, head) for head in some]
        else:
            try:
                given = [(block, head) for block, head in heads]
            except (TypeError, ValueError):
                raise ValueError("heads must be (block, head) pairs") from None
        pairs = {(whole("a block", block, 0), whole("a head", head, 0)) for block, head in given}
        object.__setattr__(self, "pairs", frozenset(pairs))

    @classmethod
    def all(cls, model: TransformerBridge, blocks: Iterable[int] | None = None) -> Heads:
        """Every head of the model, or of some of its blocks.

        >>> len(lk.Heads.all(model)) == model.cfg.n_layers * model.cfg.n_heads
        True
        """
        chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
        return cls((block, head) for block in chosen for head in range(model.cfg.n_heads))

    @classmethod
    def load(cls, path: str | Path) -> Heads:
        """Read ``{"block": [heads]}``, the JSON of PASTA's head configurations.

        Raises ValueError that names the file where it holds anything else.
        """
        try:
            found = read_json(path)
            if not isinstance(found, dict):
                raise ValueError("it is no object of {block: [heads]}")
            return cls({int(block): heads for block, heads in found.items()})
        except ValueError as error:
            raise ValueError(f"{path} holds no heads: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON that ``load`` reads, blocks and heads in order."""
        own = {str(block): list(heads) for block, heads in self.by_block().items()}
        Path(path).write_text(json.dumps(own) + "\n", encoding="utf-8")

    def by_block(self) -> dict[int, tuple[int, ...]]:
        """The heads of each block that has any, both in order."""
        blocks: dict[int, tuple[int, ...]] = {}
        for block, head in self:
            blocks[block] = (*blocks.get(block, ()), head)
        return blocks

    def mask(self, model: TransformerBridge) -> Bool[Tensor, "block head"]:
        """True for the heads of the set; raises ValueError for heads that the model has not."""
        blocks, heads = model.cfg.n_layers, model.cfg.n_heads
        if wrong := [pair for pair in self if pair[0] >= blocks or pair[1] >= heads]:
            raise ValueError(
                f"heads {wrong[:5]} are not in this model, which has {blocks} blocks of {heads} "
                f"heads, (0, 0) to ({blocks - 1}, {heads - 1})"
            )
        mask = torch.zeros(blocks, heads, dtype=torch.bool)
        for block, head in self:
            mask[block, head] = True
        return mask

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(sorted(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __contains__(self, pair: object) -> bool:
        return pair in self.pairs

    def __or__(self, other: Heads) -> Heads:
        return Heads(self.pairs | other.pairs)

    def __and__(self, other: Heads) -> Heads:
        return Heads(self.pairs & other.pairs)

    def __sub__(self, other: Heads) -> Heads:
        return Heads(self.pairs - other.pairs)

    def __xor__(self, other: Heads) -> Heads:
        return Heads(self.pairs ^ other.pairs)

    def __le__(self, other: Heads) -> bool:
        return self.pairs <= other.pairs

    def _headline(self) -> str:
        return f"Heads: {count(len(self), 'head')} in {count(len(self.by_block()), 'block')}"

    def _rows(self) -> dict[str, object]:
        return {f"block {b}": ", ".join(map(str, heads)) for b, heads in self.by_block().items()}
