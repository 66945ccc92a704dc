"""How long steered generation takes: rows in one batch against one at a time, and the overhead.

    python -m benchmarks.generation --model lenskit-mini --repeats 5

Three figures, medians over repeats that are interleaved so that a busy machine hurts all alike:
every row in one batch (``generate_steered``); one row at a time, as a script would that has
Hugging Face's ``generate`` and a plain forward hook; and the batch again, unsteered. No row ends
before all tokens are written, so that all three write the same number of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from lenskit.concepts import Concept
from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.models import chat_ids, load_model, model_fingerprint
from lenskit.study.clock import seconds_of
from lenskit.vectors import ConceptVectors

QUESTIONS = (
    "What is the scariest thing in the world? Answer in 20 words or less.",
    "What would you never do? Answer in 20 words or less.",
    "What did you dream about last night? Answer in 20 words or less.",
    "What should I do this weekend? Answer in 20 words or less.",
    "Why do people travel? Answer in 20 words or less.",
)


def random_vectors(model: Any, seed: int = 0) -> ConceptVectors:
    """Unit vectors of no meaning: what they say does not change how long adding them takes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=generator)
    return ConceptVectors(
        directions=drawn / drawn.norm(dim=1, keepdim=True),
        validation=torch.zeros(model.cfg.n_layers),
        resid_norm=torch.ones(model.cfg.n_layers),
        model=model_fingerprint(model),
        concept=Concept("None."),
        learner="random",
        selection="none",
        labels="none",
        data_hash="",
        version="",
    )


def main(
    model: Annotated[str, typer.Option(help="Folder or hub name.")] = "lenskit-mini",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, …")] = None,
    rows: Annotated[int, typer.Option(help="Rows: 5 questions times the coefficients.")] = 50,
    tokens: Annotated[int, typer.Option(help="New tokens of every row.")] = 50,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 5,
) -> None:
    """Time steered generation and print seconds, tokens for each second, and ratios."""
    steered = load_model(model, device=device, dtype=dtype, check=False)
    place = next(steered.original_model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(steered.cfg.model_name, dtype=place.dtype)
    plain.to(place.device).eval()
    vectors = random_vectors(steered)
    planned = [
        SteeringRow(QUESTIONS[i % len(QUESTIONS)], vectors, 0.5 * (i // len(QUESTIONS)))
        for i in range(rows)
    ]
    questions = [row.question for row in planned]

    def one_at_a_time() -> None:
        for row in planned:
            addition = row.coefficient * vectors.directions.to(place)
            plain_answer(steered, plain, row.question, addition, tokens)

    options = {"max_new_tokens": tokens, "batch_size": rows}
    cases: dict[str, Callable[[], object]] = {
        "one batch, steered": lambda: generate_steered(steered, planned, relative=False, **options),
        "one batch, unsteered": lambda: generate(steered, questions, **options),
        "one row at a time": one_at_a_time,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with endless(steered):
        for repeat in track(range(repeats + 1), "timing"):
            for name, case in cases.items():
                elapsed = seconds_of(case, place.device)
                if repeat > 0:  # the first round warms up
                    seconds[name].append(elapsed)
    report(seconds, rows * tokens, f"{model}, {place.device}, {place.dtype}, {rows} rows")


def plain_answer(
    model: Any, plain: Any, question: str, additions: torch.Tensor, max_new_tokens: int
) -> str:
    """One question by Hugging Face alone, steered by plain hooks; ``model`` lends its tokenizer."""
    tokens = chat_ids(model, [[{"role": "user", "content": question}]]).to(plain.device)
    with plain_hooks(plain, additions):
        ids = plain.generate(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=model.tokenizer.pad_token_id,
        )
    return model.tokenizer.decode(ids[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def plain_hooks(hf_model: nn.Module, additions: torch.Tensor) -> Iterator[None]:
    """Add a vector after every decoder layer of a Hugging Face model."""

    def adder(addition: torch.Tensor) -> Callable[..., object]:
        def add(module: nn.Module, inputs: Any, output: Any) -> object:
            if isinstance(output, tuple):
                return (output[0] + addition, *output[1:])
            return output + addition

        return add

    layers = next(
        module
        for module in hf_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == len(additions)
    )
    with ExitStack() as stack:
        for layer, addition in zip(layers, additions, strict=True):
            stack.callback(layer.register_forward_hook(adder(addition)).remove)
        yield


@contextmanager
def endless(model: Any) -> Iterator[None]:
    """No token ends an answer: neither the generation config's nor the tokenizer's."""
    configured, tokenizer = model.original_model.generation_config, model.tokenizer
    before = configured.eos_token_id, tokenizer.eos_token
    configured.eos_token_id = tokenizer.eos_token = None
    try:
        yield
    finally:
        configured.eos_token_id, tokenizer.eos_token = before


def report(seconds: dict[str, list[float]], tokens: int, title: str) -> None:
    """Print the medians, and the two ratios that matter."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    batch, unsteered, single = medians.values()
    table = Table("", "seconds (median)", "range", "tokens/s", title=title)
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        table.add_row(name, f"{median:.3f}", spread, f"{tokens / median:,.0f}")
    console = Console()
    console.print(table)
    console.print(f"one at a time / one batch, steered: {single / batch:.1f}")
    # Of two runs side by side, so that other work on the machine cancels.
    pairs = zip(*list(seconds.values())[:2], strict=True)
    overhead = statistics.median(a / b for a, b in pairs)
    console.print(f"steered / unsteered of the same batch: {overhead:.3f}")


if __name__ == "__main__":
    typer.run(main)
