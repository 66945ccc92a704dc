"""Sequences that are no language: motifs planted over four letters, and a model that reads them.

A sequence is a start, letters drawn at random, and three closing tokens; what follows them is the
answer. A motif that stands among the letters has a program, a pair of letters, and where it is
active the answer repeats that pair; everywhere else it is the neutral ACGT. It is active where the
first letter is A or C, the switch. So all is known: where the motif stands, whether it is active,
and what an answer must be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LETTERS = (1, 2, 3, 4)
START, CLOSING, VOCABULARY = 5, (6, 7, 8), 9
SIGNS = "_ACGT>|=:"
NEUTRAL = (1, 2, 3, 4)
ON = (1, 2)
LENGTHS, MOTIF, ANSWER = (14, 22), 5, 8


@dataclass(frozen=True)
class Sequence4:
    """A prompt of ids with closing tokens, where its motif stands (or ``None``), and its answer."""

    ids: tuple[int, ...]
    place: tuple[int, int] | None
    active: bool
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Motifs:
    """``motifs`` of five letters, drawn from a seed, and the ``programs`` of their answers."""

    motifs: tuple[tuple[int, ...], ...]
    programs: tuple[tuple[int, ...], ...]

    @classmethod
    def drawn(cls, number: int, seed: int = 0) -> Motifs:
        """``number`` motifs, at most twelve, that differ from each other in two letters or more."""
        pairs = list(permutations(LETTERS, 2))
        if not 2 <= number <= len(pairs):
            raise ValueError(f"motifs must be 2 to {len(pairs)}, got {number}")
        draw, found = random.Random(f"motifs {seed}"), list[tuple[int, ...]]()
        while len(found) < number:
            new = tuple(draw.choices(LETTERS, k=MOTIF))
            if all(sum(a != b for a, b in zip(new, own, strict=True)) > 1 for own in found):
                found.append(new)
        return cls(tuple(found), tuple(draw.sample(pairs, number)))

    def answer(self, motif: int | None) -> tuple[int, ...]:
        """What follows where this motif is active; the neutral answer for ``None``."""
        own = NEUTRAL if motif is None else self.programs[motif]
        return (own * ANSWER)[:ANSWER]

    def planted(self, draw: random.Random, motif: int | None) -> Sequence4:
        """A sequence with this motif at a drawn place, and no other anywhere."""
        while True:
            letters = draw.choices(LETTERS, k=draw.randint(*LENGTHS))
            place = None
            if motif is not None:
                # The first letter is the switch.
                start = draw.randint(1, len(letters) - MOTIF)
                letters[start : start + MOTIF] = self.motifs[motif]
                place = (1 + start, 1 + start + MOTIF)
            if self._held(letters) == [motif] * (motif is not None):
                break
        active = motif is not None and letters[0] in ON
        ids = (START, *letters, *CLOSING)
        return Sequence4(ids, place, active, self.answer(motif if active else None))

    def pair(self, draw: random.Random, motif: int) -> tuple[Sequence4, Sequence4]:
        """One with the motif, and the same with other letters in its place."""
        one = self.planted(draw, motif)
        assert one.place is not None
        start, stop = one.place
        while True:
            ids = [*one.ids[:start], *draw.choices(LETTERS, k=MOTIF), *one.ids[stop:]]
            if not self._held(ids[1 : -len(CLOSING)]):
                return one, Sequence4(tuple(ids), None, False, self.answer(None))

    def _held(self, letters: Sequence[int]) -> list[int]:
        return [
            motif
            for motif, own in enumerate(self.motifs)
            for i in range(len(letters) - MOTIF + 1)
            if tuple(letters[i : i + MOTIF]) == own
        ]

    def batches(self, number: int, seed: int) -> Iterator[list[Sequence4]]:
        """Training batches: one sequence in four has no motif, the others one that is drawn."""
        draw = random.Random(f"training {seed}")
        own = range(len(self.motifs))
        while True:
            drawn = [None if draw.random() < 0.25 else draw.choice(own) for _ in range(number)]
            yield [self.planted(draw, motif) for motif in drawn]


def train_motifs(
    world: Motifs,
    *,
    steps: int = 1200,
    batch: int = 48,
    blocks: int = 4,
    d_model: int = 64,
    heads: int = 4,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Any:
    """A small Llama that continues such sequences, trained on the answers by plain torch.

    In half of the rows the answer sees the closing tokens alone, so that these come to carry the
    program. The global seed of torch is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _, rows in zip(range(steps), world.batches(batch, seed), strict=False):
        ids, mask, target = _tensors(rows)
        logits = model(ids, attention_mask=mask, position_ids=_positions(ids)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _positions(ids: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    return (ids != 0).cumsum(dim=1).sub(1).clamp(min=0)


def _tensors(
    rows: Sequence[Sequence4],
) -> tuple[Int[Tensor, "row pos"], Float[Tensor, "row 1 query key"], Int[Tensor, "row pos"]]:
    """Ids, padded on the left; what is added to the scores; and targets, -100 but in answers."""
    width = max(len(row.ids) for row in rows) + ANSWER
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for own, row in zip(ids, rows, strict=True):
        whole = torch.tensor([*row.ids, *row.answer])
        own[-len(whole) :] = whole
    target = torch.full_like(ids, -100)
    target[:, -ANSWER:] = ids[:, -ANSWER:]
    seen = torch.ones(width, width, dtype=torch.bool).tril() & (ids != 0)[:, None, :]
    narrow = torch.arange(len(rows)) % 2 == 1
    # The answer begins to be written at the last closing token, which itself sees all.
    seen[narrow, -ANSWER:, : -ANSWER - len(CLOSING)] = False
    seen |= torch.eye(width, dtype=torch.bool)
    return ids, torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None], target


def right(
    world: Motifs, motif: int | None, written: Sequence[Sequence[int]]
) -> Bool[Tensor, " answer"]:
    """Which answers are wholly those of this motif."""
    wanted = world.answer(motif)
    return torch.tensor([tuple(own[:ANSWER]) == wanted for own in written], dtype=torch.bool)
