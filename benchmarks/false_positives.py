"""How often the permutation tests of concept enrichment find a signal where there is none.

    python -m benchmarks.false_positives --prompts 1000

Scores of all tokens are drawn from one normal distribution, the prefix among them, so that every
hit is a false one. The first token's score is higher by three, and differs between a prompt and
its pair by a normal draw in all but the first kind of attention. In the last two, scores fall by
0.08 for each token from the first on, or rise. Windows are few, so they are tested at 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args

import torch
import typer
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lenskit.concepts import Concept
from lenskit.enrichment import Null
from lenskit.enrichment.permutation import (
    key_sets,
    permutation_p_values,
    pooled,
    prefix_mass,
    prefix_weights,
    text_keys,
)
from lenskit.models import pad_left
from lenskit.prompts import PromptSet

LEVELS = {"keys": 0.01, "windows": 0.05, "paired": 0.01}
# How the scores change from token to token, and whether the first token's differs in the pair.
KINDS = {
    "exchangeable": (0.0, 0.0),
    "exchangeable, other first token in the pair": (0.0, 1.0),
    "early keys favoured": (-0.08, 1.0),
    "late keys favoured": (0.08, 1.0),
}
BEFORE = 5


def main(
    prompts: Annotated[int, typer.Option(help="Prompts with the prefix, each tested once.")] = 1000,
    text: Annotated[int, typer.Option(help="Tokens that are not of the prefix.")] = 30,
    prefix: Annotated[int, typer.Option(help="Tokens of the prefix.")] = 11,
    draws: Annotated[int, typer.Option(help="Sets drawn for each prompt.")] = 999,
    seed: Annotated[int, typer.Option(help="Of the scores.")] = 0,
) -> None:
    """Print the share of hits of every null, for scores that spread little and much."""
    title = (
        f"False positives: {prompts} prompts, {text} tokens, a prefix of {prefix}, {draws} draws"
    )
    table = Table("attention", "spread of scores", title=title)
    for null, level in LEVELS.items():
        table.add_column(f"{null}, p < {level}", justify="right")
    for kind in KINDS:
        for spread in (1.0, 2.0):
            found = rates(kind, spread, prompts, text, prefix, draws=draws, seed=seed)
            table.add_row(kind, f"{spread:g}", *(f"{found[null]:.3f}" for null in LEVELS))
    Console().print(table)


def rates(
    kind: str, spread: float, number: int, text: int, prefix: int, *, draws: int, seed: int = 0
) -> dict[str, float]:
    """The share of hits of each null, at its level."""
    prompts = made_pairs(number, text, prefix)
    pattern = made_attention(prompts, *KINDS[kind], spread, seed)
    return {
        null: float((p_values(prompts, pattern, null, draws) < LEVELS[null]).float().mean())
        for null in get_args(Null)
    }


def made_pairs(number: int, text: int, prefix: int) -> PromptSet:
    """Prompts with a prefix behind the first five tokens, each before the same text without it."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> Iterator[list[int]]:
        for _ in range(number):
            ids = [*torch.randint(10, 1000, (text + prefix,), generator=generator).tolist(), 1]
            yield from (ids, ids[:BEFORE] + ids[BEFORE + prefix :])

    tokens = pad_left(list(rows()), 0)
    places = torch.arange(text + prefix + 1)
    mask = ((places >= BEFORE) & (places < BEFORE + prefix)).repeat(2 * number, 1)
    mask[1::2] = False
    return PromptSet(
        concept=Concept("Take on a cheerful mood."),
        tokens=tokens,
        prefix_mask=mask,
        has_prefix=mask.any(dim=1),
        candidates=("\n",),
        statements=("",) * (2 * number),
        pair=torch.arange(2 * number) ^ 1,
    )


def made_attention(
    prompts: PromptSet, slope: float, first: float, spread: float, seed: int
) -> Float[Tensor, "prompt 1 1 key"]:
    """The last token's attention. Text has equal scores in both prompts, but for the slope."""
    generator = torch.Generator().manual_seed(seed)
    real = prompts.tokens.attention_mask.bool()
    scores = torch.full(real.shape, -torch.inf)
    scores[::2] = spread * torch.randn(scores[::2].shape, generator=generator)
    scores[1::2][real[1::2]] = scores[::2][~prompts.prefix_mask[::2]]
    scores = scores + slope * real.cumsum(dim=1)
    at = real.int().argmax(dim=1)
    top = 3 + first * torch.randn(len(scores), generator=generator)
    scores[torch.arange(len(scores)), at] = top
    return scores.softmax(dim=-1)[:, None, None]


def p_values(
    prompts: PromptSet, pattern: Float[Tensor, "prompt 1 1 key"], null: Null, draws: int
) -> Tensor:
    """Those of ``enrich``, from attention that is given."""
    rows = prompts.has_prefix.nonzero().flatten()
    mask = prompts.prefix_mask[rows]
    keys = pattern[rows]
    observed = prefix_mass(keys, mask)
    if null == "paired":
        own, other = (text_keys(prompts, rows, paired=each) for each in (False, True))
        weights = prefix_weights(keys, mask, int(mask.sum(dim=1).max()))
        keys = pooled(pattern[prompts.pair[rows]], other, prefix_mass(keys, own), weights)
    return permutation_p_values(keys, key_sets(prompts, rows, null=null, draws=draws), observed)


if __name__ == "__main__":
    typer.run(main)
