"""How long the permutation tests of concept enrichment take, without the model's forward pass.

    python -m benchmarks.enrichment --prompts 400 --blocks 32 --heads 32

The floor is the arithmetic of the null as one dense product for each prompt and block, of a 0/1
matrix [set, key] with the attention [key, head and candidate]; the tests may beat it, since they
only touch the keys that are in a set. The Python loop draws and sums one set at a time, and is
timed on a few tests and scaled up. Figures are medians over repeats that are interleaved so that a
busy machine hurts all alike; one block is timed and stands for all.
"""

from __future__ import annotations

import random
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from lenskit.concepts import Concept
from lenskit.enrichment.permutation import KeySets, key_sets, permutation_p_values, prefix_mass
from lenskit.models import Tokens
from lenskit.prompts import PromptSet

CANDIDATES = 5


def main(
    prompts: Annotated[int, typer.Option(help="Prompts with the prefix.")] = 400,
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 32,
    heads: Annotated[int, typer.Option(help="Heads of a block.")] = 32,
    keys: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 64,
    prefix: Annotated[int, typer.Option(help="Tokens of the prefix.")] = 11,
    draws: Annotated[int, typer.Option(help="Sets drawn for each prompt.")] = 999,
    batch_size: Annotated[int, typer.Option(help="Prompts of a batch.")] = 64,
    device: Annotated[str, typer.Option(help="Where the attention is.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 5,
) -> None:
    """Print the seconds of each part of the tests, of their floor, and of a Python loop."""
    if threads is not None:
        torch.set_num_threads(threads)
    made = made_prompts(prompts, keys, prefix)
    batches = list(torch.arange(prompts).split(batch_size))
    pattern = torch.randn(batch_size, heads, CANDIDATES, keys).softmax(dim=-1).to(device)

    members = (torch.rand(batch_size, draws, keys) < prefix / keys).float().to(device)
    weights = pattern[0, 0].tolist()
    few = 10

    def draw() -> list[KeySets]:
        return [key_sets(made, rows, draws=draws).to(device) for rows in batches]

    def test() -> None:
        for rows, of_batch in zip(batches, sets, strict=True):
            part = pattern[: len(rows)]
            mass = prefix_mass(part, made.prefix_mask[rows].to(device))
            permutation_p_values(part, of_batch, mass).cpu()

    def multiply() -> None:
        for rows in batches:
            torch.bmm(members[: len(rows)], pattern[: len(rows)].flatten(1, 2).mT)

    def loop() -> None:
        for i in range(few):
            one_test(weights[i % CANDIDATES], prefix, draws)

    sets = draw()
    # The work does not depend on the values, so that one block can stand for all.
    cases = {"draw": draw, "test": test, "floor": multiply, "loop": loop}
    taken = measure.medians(cases, torch.device(device), repeats)
    draw_s, test_s, floor_s = taken["draw"], taken["test"] * blocks, taken["floor"] * blocks
    loop_s = taken["loop"] * prompts * blocks * heads * CANDIDATES / few

    title = f"{prompts} prompts, {blocks} blocks, {heads} heads, {draws} draws, {device}"
    table = Table(title=title)
    for heading in ("part", "seconds", "times the floor"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, time_s in (
        ("drawing sets", draw_s),
        ("p-values", test_s),
        ("both", draw_s + test_s),
        ("floor: one product per prompt and block", floor_s),
        ("Python loop (scaled up)", loop_s),
    ):
        table.add_row(part, f"{time_s:,.2f}", f"{time_s / floor_s:,.2f}")
    Console().print(table)


def made_prompts(prompts: int, keys: int, prefix: int) -> PromptSet:
    """Prompts of random tokens, a fifth shorter at most, the prefix behind the first five."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(keys - keys // 5, keys + 1, (prompts,), generator=generator)
    places = torch.arange(keys) - (keys - lengths)[:, None]
    ids = torch.randint(10, 1000, (prompts, keys), generator=generator)
    ids[:, -CANDIDATES:] = torch.arange(CANDIDATES)
    return PromptSet(
        concept=Concept("Take on a cheerful mood."),
        tokens=Tokens(ids, (places >= 0).long()),
        prefix_mask=(places >= 5) & (places < 5 + prefix),
        has_prefix=torch.ones(prompts, dtype=torch.bool),
        candidates=tuple("abcde"),
        statements=("",) * prompts,
        pair=torch.full((prompts,), -1),
    )


def one_test(weights: list[float], prefix: int, draws: int) -> float:
    """One test, one set after the other."""
    observed = sum(weights[5 : 5 + prefix])
    reached = 0
    for _ in range(draws):
        drawn = random.sample(range(1, len(weights)), prefix)
        reached += sum(weights[key] for key in drawn) >= observed
    return (reached + 1) / (draws + 1)


if __name__ == "__main__":
    typer.run(main)
