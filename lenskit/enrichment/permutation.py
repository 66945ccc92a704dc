"""Permutation tests of attention mass: sets of keys, and p-values against them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from lenskit.prompts import PromptSet

Null = Literal["keys", "windows", "paired"]

# What stands in ``KeySets.keys`` for no key: they are the columns that follow the last key.
NO_KEY, NO_SET = 0, 1
# The same weights summed in another order differ by rounding; such masses are to count as equal.
_TIE = 1e-5
# Masses held at once: what stays in a CPU's cache, or fills a GPU (half a gigabyte).
_CHUNK = {"cpu": 2**20, "cuda": 2**27}


@dataclass(frozen=True)
class KeySets:
    """For each prompt and candidate token, the sets of keys that the prefix is compared with.

    ``keys`` are counted from the end of the prompt, -1 its last token (with ``null="paired"``, of
    what ``pooled`` returns); ``NO_KEY`` fills a set with fewer keys than others, ``NO_SET`` the
    place of a set that does not exist. ``number``: the sets of each prompt and candidate.
    """

    keys: Int[Tensor, "prompt candidate set place"]
    number: Int[Tensor, "prompt candidate"]

    def to(self, device: str | torch.device) -> KeySets:
        """The same sets on another device."""
        return KeySets(self.keys.to(device), self.number.to(device))


def key_sets(
    prompts: PromptSet,
    rows: Int[Tensor, " prompt"],
    *,
    null: Null = "keys",
    draws: int = 999,
    seed: int = 0,
) -> KeySets:
    """The sets of keys of one null for the prompts ``rows``, all with a prefix; see ``enrich``.

    They depend on ``seed`` and on each prompt's own tokens: not on its place, on the other
    prompts or on padding. They are drawn on the CPU, so that every device gets the same.
    """
    sources = [_source(prompts, row, null) for row in rows.tolist()]
    sets = [_sets(source, null, draws, seed) for source in sources]
    number = torch.tensor([[len(s) for s in of_prompt] for of_prompt in sets])
    places = max(source.size for source in sources)
    shape = (*number.shape, int(number.max()), places)
    keys = torch.full(shape, NO_SET, dtype=torch.int32)
    for i, source in enumerate(sources):
        for c, indices in enumerate(sets[i]):
            keys[i, c, : len(indices)] = NO_KEY
            keys[i, c, : len(indices), : source.size] = source.keys(indices)
    return KeySets(keys, number)


def number_of_sets(
    prompts: PromptSet, rows: Int[Tensor, " prompt"], *, null: Null = "keys", draws: int = 999
) -> Int[Tensor, "prompt candidate"]:
    """How many sets ``key_sets`` would give each prompt and candidate."""
    sources = [_source(prompts, row, null) for row in rows.tolist()]
    return torch.tensor([[_number(s, m, null, draws) for m in s.visible] for s in sources])


def prefix_mass(
    pattern: Float[Tensor, "prompt head candidate key"], prefix_mask: Bool[Tensor, "prompt key"]
) -> Float[Tensor, "prompt head candidate"]:
    """Attention mass on the prefix, in float32."""
    # Not a matrix product, which a GPU may be set to round to fewer bits.
    outside = ~prefix_mask[:, None, None]
    return pattern.float().masked_fill(outside, 0).sum(dim=-1)


def prefix_weights(
    pattern: Float[Tensor, "prompt head candidate key"],
    prefix_mask: Bool[Tensor, "prompt key"],
    places: int,
) -> Float[Tensor, "prompt head candidate place"]:
    """Attention to each token of the prefix, in float32, the last one at the last place."""
    order = prefix_mask.int().argsort(dim=1, stable=True)[:, -places:]
    weights = pattern.float().gather(-1, order[:, None, None].expand(*pattern.shape[:3], -1))
    weights = weights.masked_fill(~prefix_mask.gather(1, order)[:, None, None], 0)
    return functional.pad(weights, (places - weights.shape[-1], 0))


def text_keys(
    prompts: PromptSet, rows: Int[Tensor, " prompt"], *, paired: bool = False
) -> Bool[Tensor, "prompt key"]:
    """Which keys prompts with a prefix share with their paired ones: of those, or of the others.

    All but the prefix, and but the first token, unless the prefix begins there.
    """
    mask = prompts.tokens.attention_mask.bool()
    other = prompts.pair[rows] if paired else rows
    first = mask & (mask.cumsum(dim=1) == 1)
    begins = (first[rows] & prompts.prefix_mask[rows]).any(dim=1)
    return mask[other] & ~prompts.prefix_mask[other] & (~first[other] | begins[:, None])


def pooled(
    pattern: Float[Tensor, "prompt head candidate key"],
    keys: Bool[Tensor, "prompt key"],
    text: Float[Tensor, "prompt head candidate"],
    weights: Float[Tensor, "prompt head candidate place"],
) -> Float[Tensor, "prompt head candidate column"]:
    """Attention of prompts without the prefix, as their sets of keys with ``"paired"`` want it.

    It is scaled so that the mass on ``keys`` is ``text``, what the same text has in the prompt
    with the prefix; the ``weights`` of the prefix there follow.
    """
    mass = prefix_mass(pattern, keys)
    scale = torch.where(mass > 0, text / mass, 0.0)
    return torch.cat([pattern.float() * scale[..., None], weights], dim=-1)


def permutation_p_values(
    pattern: Float[Tensor, "prompt head candidate key"],
    sets: KeySets,
    observed: Float[Tensor, "prompt head candidate"],
) -> Float[Tensor, "prompt head candidate"]:
    """p = (b + 1) / (B + 1), where b of a prompt's B sets have at least the observed mass.

    Keys are right-aligned: the last column is the last token of every prompt. A mass less than
    the observed one by no more than rounding is a tie, and counts. All on one device.
    """
    prompts, heads, candidates, width = pattern.shape
    # Two columns follow the keys: NO_KEY adds nothing, NO_SET makes a mass that never counts.
    table = functional.pad(pattern.float().permute(0, 2, 3, 1), (0, 0, 0, 2))
    table[:, :, width + NO_SET] = -torch.inf
    threshold = observed.float().transpose(1, 2)[:, :, None] * (1 - _TIE)
    reached = torch.empty(prompts, candidates, heads, device=pattern.device)
    places = sets.keys.shape[-1]
    masses = sets.keys.shape[1:3].numel() * heads
    size = max(1, _CHUNK.get(pattern.device.type, _CHUNK["cpu"]) // max(masses, 1))
    for start in range(0, prompts, size):
        part = slice(start, start + size)
        keys = sets.keys[part]
        first = torch.arange(keys.shape[0] * candidates, device=keys.device, dtype=torch.int32)
        index = keys + (first * (width + 2) + width).view(-1, candidates, 1, 1)
        # The mass of a set is a sum of P rows of the table. As a product with a 0/1 matrix it
        # would take as many operations per key of the prompt as this takes per key of the set.
        null = functional.embedding_bag(
            index.reshape(-1, places), table[part].reshape(-1, heads), mode="sum"
        ).view(*keys.shape[:3], heads)
        reached[part] = (null >= threshold[part]).sum(dim=2).float()
    return ((reached + 1) / (sets.number[..., None] + 1)).transpose(1, 2)


@dataclass(frozen=True)
class _Source:
    """The keys that the sets of one prompt are made of: indices from 0, the first at ``start``.

    ``visible``: how many of them each candidate token sees. ``prefix``: the prefix among them.
    ``added``: how many tokens of the prefix come before the first key, although they stand behind
    the last, as ``pooled`` has it; 0 where the prefix stands in its place.
    """

    ids: list[int]
    start: int
    visible: list[int]
    prefix: tuple[int, ...]
    added: int = 0

    @property
    def size(self) -> int:
        """The number of tokens of the prefix."""
        return len(self.prefix)

    def keys(self, indices: Int[Tensor, "set place"]) -> Int[Tensor, "set place"]:
        """What stands for these indices in ``KeySets.keys``."""
        behind = indices - self.added
        return torch.where(behind < 0, behind, behind + self.start)


def _source(prompts: PromptSet, row: int, null: Null) -> _Source:
    if null not in get_args(Null):
        raise ValueError(f"null must be one of {', '.join(get_args(Null))}; got {null!r}")
    ids, attention_mask = prompts.tokens.input_ids, prompts.tokens.attention_mask.bool()
    prefix = prompts.prefix_mask[row, attention_mask[row]]
    if not bool(prefix.any()):
        raise ValueError(f"prompt {row} has no prefix, so there is no attention to it to test")
    # The first token soaks up attention; without it, a set of keys is comparable to the prefix.
    skip = 0 if bool(prefix[0]) else 1
    indices = tuple((prefix.nonzero().flatten() - skip).tolist())
    other = int(prompts.pair[row]) if null == "paired" else row
    if other < 0:
        raise ValueError(
            f"null='paired' needs the prompt without prefix for each prompt, and prompt {row} has "
            "none; build the prompts with layout='paired'"
        )
    tokens = ids[other, attention_mask[other]].tolist()
    last = len(tokens) - skip
    visible = [last - place for place in reversed(range(len(prompts.candidates)))]
    if null == "paired":
        size = len(indices)
        start = -last - int(prompts.prefix_mask.sum(dim=1).max())
        return _Source(tokens, start, [size + v for v in visible], tuple(range(size)), size)
    if indices[-1] >= visible[0]:
        raise ValueError(f"the prefix of prompt {row} lies behind its first candidate token")
    if null == "windows" and indices[-1] - indices[0] != len(indices) - 1:
        raise ValueError(f"null='windows' needs a prefix without gaps; prompt {row} has one")
    return _Source(tokens, -last, visible, indices)


def _number(source: _Source, visible: int, null: Null, draws: int) -> int:
    if null == "windows":
        return visible - source.size
    every = comb(visible, source.size)
    return every - 1 if every <= draws else draws


def _sets(source: _Source, null: Null, draws: int, seed: int) -> list[Int[Tensor, "set place"]]:
    """The sets of each candidate token, as indices into the source's keys."""
    size, sets = source.size, []
    order = None
    for visible in source.visible:
        if null == "windows":
            starts = torch.arange(visible - size + 1)
            starts = starts[starts != source.prefix[0]]
            sets.append(starts[:, None] + torch.arange(size))
        elif comb(visible, size) <= draws:
            every = [keys for keys in combinations(range(visible), size) if keys != source.prefix]
            sets.append(torch.tensor(every, dtype=torch.long).view(-1, size))
        else:
            order = _random_order(source, draws, seed) if order is None else order
            seen = order < visible
            sets.append(order[seen & (seen.cumsum(dim=1) <= size)].view(draws, size))
    return sets


def _random_order(source: _Source, draws: int, seed: int) -> Int[Tensor, "draw place"]:
    """For each draw, the first keys of a random order of all.

    The first P of them that a candidate token can see are a uniform draw of P from what it sees.
    No more than the other candidate tokens can stand among them unseen.
    """
    numbers = np.random.default_rng([seed, *source.ids]).random(
        (draws, source.visible[-1]), dtype=np.float32
    )
    places = min(source.visible[-1], source.size + len(source.visible) - 1)
    return torch.from_numpy(numbers).topk(places, largest=False).indices
