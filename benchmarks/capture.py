"""Capture against the model's own forward pass: time and peak memory.

    python -m benchmarks.capture --shape small

The yardstick is Hugging Face's model with fused attention (sdpa) on the same prompts, in batches
of the same size, left padded as a tokenizer gives them; it keeps nothing and computes the logits
of one token only. Beside it stand the same model with eager attention that returns all patterns
and hidden states, and the procedure as published, one prompt at a time (benchmarks/plain.py).
Seconds are medians over repeats that are interleaved; memory is the growth at the peak.

Where prompts begin alike, as those of one concept do, that part is run once, and a captured pass is
cheaper than the forward pass. The second table holds a few prompts fixed and makes them longer, and
those share next to nothing: a captured pass must not grow with the squared length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer

from benchmarks import measure
from benchmarks.plain import plain_capture
from lenskit.capture import capture
from lenskit.concepts import concepts
from lenskit.prompts import PromptSet, build_prompts
from lenskit.study.clock import seconds_of
from lenskit.study.plan import prompts_of_length

TARGET = 1.1
YARDSTICK = "Hugging Face, sdpa"
EVERYTHING = "Hugging Face, eager, all returned"
SHORT = {YARDSTICK: "sdpa", "capture, eager": "eager capture", EVERYTHING: "eager, all"}


def cases(
    pair: measure.Pair, prompts: PromptSet, batch_size: int
) -> dict[str, Callable[[], object]]:
    """What is timed, the yardstick first."""

    @torch.no_grad()
    def forward(attention: str, **options: bool) -> None:
        pair.plain.set_attn_implementation(attention)
        for rows in torch.arange(len(prompts)).split(batch_size):
            tokens = prompts.tokens.rows(rows).to(pair.device)
            pair.plain(
                tokens.input_ids,
                attention_mask=tokens.attention_mask,
                use_cache=False,
                logits_to_keep=1,
                **options,
            )
        pair.plain.set_attn_implementation("sdpa")

    def captured(attention: str) -> None:
        capture(pair.model, prompts, batch_size=batch_size, attention=attention, progress=False)

    return {
        YARDSTICK: lambda: forward("sdpa"),
        "capture": lambda: captured("auto"),
        "capture, eager": lambda: captured("eager"),
        EVERYTHING: lambda: forward("eager", output_attentions=True, output_hidden_states=True),
    }


def run(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    prompts: Annotated[int, typer.Option(help="Prompts of one concept.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Prompts of a batch.")] = 64,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 5,
) -> list[measure.Report]:
    """Seconds and memory of one concept's prompts, and of a few that grow longer."""
    pair = measure.load(shape, device, dtype)
    prompts, repeats = (min(prompts, 128), min(repeats, 3)) if quick else (prompts, repeats)
    concept = concepts["fears"]["spiders"]
    made = build_prompts(pair.model, concept, number=prompts)
    return [
        against_forward(pair, made, batch_size, repeats),
        over_lengths(pair, made, (64, 128, 256, 512) if quick else (64, 128, 256, 512, 1024)),
    ]


def against_forward(
    pair: measure.Pair, prompts: PromptSet, batch_size: int, repeats: int
) -> measure.Report:
    """Seconds and memory of one concept's prompts."""
    timed = cases(pair, prompts, batch_size)
    taken = measure.medians(timed, pair.device, repeats)
    length = prompts.tokens.lengths.float().mean()
    report = measure.Report(
        f"Capture, {pair.name}, {len(prompts)} prompts of {length:.0f} tokens, batches of "
        f"{batch_size}",
        ("what", "seconds", "ratio", "target", "peak MB"),
        note=f"Ratios are to {YARDSTICK}.",
    )
    for name, case in timed.items():
        target = f"<= {TARGET}" if name == "capture" else ""
        memory = measure.peak_memory(case, pair.device)
        report.add(name, taken[name], taken[name] / taken[YARDSTICK], target, memory)
    few = prompts.rows(range(min(40, len(prompts))))
    one_by_one = seconds_of(lambda: plain_capture(pair.plain, few), pair.device)
    one_by_one *= len(prompts) / len(few)
    report.add(
        "as published, one prompt at a time", one_by_one, one_by_one / taken[YARDSTICK], "", ""
    )
    return report


def over_lengths(
    pair: measure.Pair, prompts: PromptSet, lengths: tuple[int, ...]
) -> measure.Report:
    """Seconds and memory of 8 prompts as they get longer, with the exponent of the growth."""
    few = prompts.rows(range(8))
    names = [SHORT.get(name, name) for name in cases(pair, few, 8)]
    report = measure.Report(
        f"Capture of 8 longer prompts, {pair.name}",
        ("tokens", *(f"{name}, {unit}" for name in names for unit in ("s", "MB"))),
        note="The last row is p of cost ~ tokens^p over the three longest; 1 is linear. "
        f"«sdpa» is {YARDSTICK}, «eager, all» {EVERYTHING}.",
    )
    found: list[list[float]] = []
    for length in lengths:
        timed = cases(pair, prompts_of_length(few, length), 8)
        taken = measure.medians(timed, pair.device, 3)
        memory = [measure.peak_memory(case, pair.device) for case in timed.values()]
        found.append([v for pair_ in zip(taken.values(), memory, strict=True) for v in pair_])
        report.add(length, *found[-1])
    longest = [float(length) for length in lengths[-3:]]
    columns = zip(*found[-3:], strict=True)
    report.add("p", *(measure.exponent(longest, list(column)) for column in columns))
    return report


if __name__ == "__main__":
    measure.command(run)
