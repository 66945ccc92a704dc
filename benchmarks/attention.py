"""What edits of attention cost in generation, over generation that edits nothing.

    python -m benchmarks.attention --shape embedded

Every row of one batch has a span of its own. Policies that are constants go into the mask of fused
attention; one that reads the attention has its scores computed. Beside them is the usual way: eager
attention, every block's whole pattern multiplied and normalised again by a plain hook. Cases take
turns, so that a busy machine hurts all alike, and no answer ends before all tokens are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

import lenskit as lk
from benchmarks import measure
from benchmarks.generation import endless
from lenskit.models import chat_ids

SPAN = "Answer in one word."


def run(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 50,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    tokens: Annotated[int, typer.Option(help="New tokens of every row.")] = 50,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 5,
) -> list[measure.Report]:
    """Seconds of each way, and their ratio to generation without edits."""
    pair = measure.load(shape, device, dtype)
    model = pair.model
    rows, tokens, repeats = (8, 10, 2) if quick else (rows, tokens, repeats)
    questions = [prompt_of(model, length, row) for row in range(rows)]
    spans = [lk.span(model, question, SPAN) for question in questions]
    heads = lk.Heads.all(model)
    chosen = lk.Heads((block, head) for block, head in heads if (block + head) % 4 == 0)

    def plain() -> None:
        lk.generate(model, questions, max_new_tokens=tokens, batch_size=rows)

    def edited(policy: Any, some: lk.Heads = heads) -> Callable[[], None]:
        def generate() -> None:
            with lk.attend(model, spans, policy, heads=some):
                plain()

        return generate

    def eager() -> None:
        with model.hooks(fwd_hooks=[(name(0), lambda value, hook: None)]):
            plain()

    def whole_patterns() -> None:
        kept = [keys(spans, length)] * model.cfg.n_layers
        with model.hooks(fwd_hooks=[(name(b), rescaled(one)) for b, one in enumerate(kept)]):
            plain()

    cases: dict[str, Callable[[], object]] = {
        "no edit": plain,
        "constant bias (Pasta), every head": edited(lk.Pasta(0.01)),
        "constant bias (Pasta), a quarter of the heads": edited(lk.Pasta(0.01), chosen),
        "reads the mass (Spotlight), every head": edited(lk.Spotlight(0.3)),
        "eager attention, no edit": eager,
        "eager attention, whole patterns rescaled": whole_patterns,
    }
    with endless(model):
        found = measure.medians(cases, pair.device, repeats)
    report = measure.Report(
        f"Edited attention, {pair.name}, {rows} rows of {length} + {tokens} tokens, "
        f"{measure.machine(device)}",
        ("way", "seconds", "over no edit"),
    )
    for way, seconds in found.items():
        report.add(way, seconds, seconds / found["no edit"])
    return [report]


def prompt_of(model: Any, length: int, row: int) -> str:
    """A question of ``length`` tokens in the template, with the span in it."""
    words = ["rain", "stone", "river", "lamp", "cloud", "glass"]
    text = SPAN
    while True:
        longer = f"{text} {words[(row + len(text)) % len(words)]}"
        ids = chat_ids(model, [[{"role": "user", "content": longer}]])
        if ids.input_ids.shape[1] > length:
            return text
        text = longer


def name(block: int) -> str:
    return f"blocks.{block}.attn.hook_pattern"


def keys(spans: list[lk.Span], length: int) -> torch.Tensor:
    """The span's keys of each row's prompt, padded on the left to the longest."""
    width = max(span.length for span in spans)
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, span in enumerate(spans):
        mask[row, [width - span.length + position for position in span.positions]] = True
    return mask


def rescaled(span: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A hook that scales what the prompt's other keys get and normalises the pattern again."""

    def rescale(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        factor = torch.ones(len(span), pattern.shape[-1])
        factor[:, : span.shape[1]] = torch.where(span, 1.0, 0.01)
        pattern = pattern * factor[:, None, None]
        return pattern / pattern.sum(dim=-1, keepdim=True)

    return rescale


if __name__ == "__main__":
    measure.command(run)
