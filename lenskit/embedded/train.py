"""Train the embedded model on its own grammar: ``python -m lenskit.embedded.train``.

Seeded and resumable: every step draws its dialogues from (seed, step), and the state is kept as
safetensors, so a run that was stopped and started again ends where it would have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lenskit.embedded.batches import Batch, encode, micro_batches
from lenskit.embedded.corpus import dialogues
from lenskit.embedded.grammar import Grammar, load_grammar
from lenskit.embedded.masks import Narrowing
from lenskit.embedded.objective import gradient, price_at
from lenskit.embedded.optimizers import optimizers, schedule
from lenskit.embedded.recipe import Recipe, Size, mixture_at, new_model, with_concepts
from lenskit.embedded.state import flat, load_state, run_settings, save_model, save_state
from lenskit.embedded.tokenizer import train_tokenizer

TOKENIZER_DIALOGUES = 30_000
LOG_EVERY = 25
MICRO_BATCH = 1024


def new_tokenizer(grammar: Grammar, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer of a run, learnt from dialogues of both mixtures."""
    texts = [
        dialogue
        for mixture in (mixture_at(recipe, 0), mixture_at(recipe, recipe.steps))
        for dialogue in islice(dialogues(grammar, recipe.seed, mixture), TOKENIZER_DIALOGUES // 2)
    ]
    return train_tokenizer(texts, recipe.size.vocabulary)


def draw(
    grammar: Grammar,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    step: int,
    tokens: int = MICRO_BATCH,
) -> list[Batch]:
    """The micro-batches of one step, of at most ``tokens`` each: they follow from seed and step."""
    random = Random(f"{recipe.seed}:{step}")
    stream = dialogues(grammar, random.getrandbits(48), mixture_at(recipe, step))
    chosen = list(islice(stream, recipe.batch))
    rows = encode(tokenizer, chosen)
    if step >= recipe.narrow_from * recipe.steps:
        narrowing = recipe.narrowing
        if step < recipe.hidden_from * recipe.steps:
            narrowing = replace(narrowing, hidden=0.0)
        sights = [narrowing.draw(random) if d.may_be_narrow else None for d in chosen]
        rows = [replace(row, sight=sight) for row, sight in zip(rows, sights, strict=True)]
    return micro_batches(rows, tokens, tokenizer)


def train_step(
    model: LlamaForCausalLM,
    batches: Sequence[Batch],
    optims: Sequence[torch.optim.Optimizer],
    price: float,
    workers: ThreadPoolExecutor,
) -> dict[str, float]:
    """One update of ``model``; the mean cross entropy of a target token and the mean price.

    Each worker takes the next micro-batch as it is done with one; the gradients are added in the
    order of the micro-batches, so the number of workers leaves the result alone.
    """
    targets = sum(int(batch.target.sum()) for batch in batches)
    rows = sum(len(batch.ids) for batch in batches)
    jobs = [workers.submit(gradient, model, b, targets, rows, price) for b in batches]
    parameters = list(model.parameters())
    entropy = paid = 0.0
    for i, job in enumerate(jobs):
        gradients, its_entropy, its_paid = job.result()
        entropy, paid = entropy + its_entropy, paid + its_paid
        if i == 0:
            for parameter, part in zip(parameters, gradients, strict=True):
                parameter.grad = part
        else:
            torch._foreach_add_([p.grad for p in parameters], list(gradients))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optims:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": entropy / targets, "price": paid / rows}


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    state: Path | None = None,
    save_every: int = 100,
    threads: int = 1,
    micro_batch: int = MICRO_BATCH,
    checkpoint: Callable[[int, list[dict]], None] | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train ``model`` in place by ``recipe``; returns the log: step, loss, price and seconds.

    With ``state`` the run is kept in that file every ``save_every`` steps, and goes on from there.
    ``threads`` micro-batches of at most ``micro_batch`` tokens are computed at a time.
    ``checkpoint`` is called after every step with the number of steps taken and the log. Raises
    ValueError for the state of a run with other settings.
    """
    grammar = with_concepts(load_grammar(), recipe.concepts)
    settings = run_settings(model, flat(asdict(recipe)))
    start, log = 0, list[dict]()
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers,
        ThreadPoolExecutor(1) as ahead,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not progress) as bar,
    ):
        optims = optimizers(model, recipe.learning_rate, workers.map)
        if state is not None:
            if state.exists():
                start, log = load_state(state, model, optims, settings)
            state.parent.mkdir(parents=True, exist_ok=True)
        task = bar.add_task("training", total=recipe.steps, completed=start)
        began = time.perf_counter()
        coming = ahead.submit(draw, grammar, tokenizer, recipe, start, micro_batch)
        for step in range(start, recipe.steps):
            for group in (group for optimizer in optims for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate * schedule(step, recipe.steps)
            factor = price_at(step, recipe.steps, recipe.price, recipe.ramp)
            batches, done = coming.result(), step + 1
            coming = ahead.submit(draw, grammar, tokenizer, recipe, done, micro_batch)
            found = train_step(model, batches, optims, factor, workers)
            bar.update(task, advance=1, description=f"training, loss {found['loss']:.3f}")
            if done % LOG_EVERY == 0 or done == recipe.steps:
                seconds = (log[-1]["seconds"] if log else 0.0) + time.perf_counter() - began
                began = time.perf_counter()
                found = {name: round(value, 4) for name, value in found.items()}
                log.append({"step": done} | found | {"seconds": round(seconds, 1)})
            if state is not None and (done % save_every == 0 or done == recipe.steps):
                save_state(state, model, optims, done, log, settings)
            if checkpoint is not None:
                checkpoint(done, log)
    return log


def train_and_save(
    recipe: Recipe,
    out: Path,
    state: Path | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    save_every: int = 100,
    micro_batch: int = 0,
    checkpoint_every: int = 0,
) -> None:
    """Train by ``recipe`` and write the model's folder, with checkpoints beside ``state``."""
    tokenizer = new_tokenizer(with_concepts(load_grammar(), recipe.concepts), recipe)
    model = new_model(tokenizer, recipe.size, recipe.seed).to(device)

    def save(folder: Path, log: list[dict]) -> None:
        facts = {"parameters": model.num_parameters(), "device": device}
        truth = {name: dict(rules.activity) for name, rules in load_grammar().classes.items()}
        facts |= flat(asdict(recipe)) | {"activity": truth, "log": log}
        save_model(folder, model, tokenizer, facts)

    def checkpoint(step: int, log: list[dict]) -> None:
        if checkpoint_every and step % checkpoint_every == 0:
            folder = out if state is None else state.parent
            save(folder / f"checkpoint-{step}", log)

    # The cores are the workers'; a second team of threads beside them only waits for them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        log = train_model(
            model,
            tokenizer,
            recipe,
            state=state,
            save_every=save_every,
            threads=threads if device == "cpu" else 1,
            micro_batch=micro_batch or (MICRO_BATCH if device == "cpu" else 16 * MICRO_BATCH),
            checkpoint=checkpoint,
        )
    finally:
        torch.set_num_threads(before)
    save(out, log)


DEFAULT, SIZE, NARROWING = Recipe(), Size(), Narrowing()


def train(
    out: Annotated[Path, typer.Option(help="folder of the finished model")] = Path(
        "data/lenskit-mini"
    ),
    state: Annotated[Path, typer.Option(help="where the resumable state is kept")] = Path(
        ".lenskit-train/state.safetensors"
    ),
    steps: int = DEFAULT.steps,
    batch: Annotated[int, typer.Option(help="dialogues of a step")] = DEFAULT.batch,
    learning_rate: float = DEFAULT.learning_rate,
    seed: int = DEFAULT.seed,
    first: Annotated[float, typer.Option(help="share of steps of the first mixture")] = (
        DEFAULT.first
    ),
    narrow_from: Annotated[
        float, typer.Option(help="share of steps from which on dialogues may be narrow")
    ] = DEFAULT.narrow_from,
    hidden_from: Annotated[
        float, typer.Option(help="share of steps from which on closing tokens are hidden in them")
    ] = DEFAULT.hidden_from,
    price: Annotated[
        float,
        typer.Option(
            help="factor of the price on attention: what the template's closing tokens attend to "
            "beyond the first token and themselves is added to the loss. 0.03 to 0.1 makes heads "
            "fetch only what is active; above about 0.2 one head without a gate gets cheaper than "
            "two with, and activity is no longer followed"
        ),
    ] = DEFAULT.price,
    price_from: Annotated[float, typer.Option(help="share of steps at which it starts")] = (
        DEFAULT.ramp[0]
    ),
    price_to: Annotated[float, typer.Option(help="share of steps from which on it is whole")] = (
        DEFAULT.ramp[1]
    ),
    narrow: Annotated[
        float,
        typer.Option(
            help="share of the concept dialogues whose answer sees no text of the prompt, only the "
            "template's closing tokens"
        ),
    ] = NARROWING.narrow,
    hidden: Annotated[
        float,
        typer.Option(
            help="share of these in which it sees a random part of the closing tokens, token -1 "
            "too, so that several tokens come to hold the concept"
        ),
    ] = NARROWING.hidden,
    forgotten: Annotated[
        float, typer.Option(help="share of those in which it does not see token -1 either")
    ] = NARROWING.forgotten,
    blocks: int = SIZE.blocks,
    d_model: int = SIZE.d_model,
    heads: int = SIZE.heads,
    kv_heads: int = SIZE.kv_heads,
    vocabulary: int = SIZE.vocabulary,
    concepts: Annotated[
        int, typer.Option(help="how many concepts, evenly over the classes; 0: all")
    ] = DEFAULT.concepts,
    without: Annotated[
        list[str] | None, typer.Option(help="a task to leave out, by name; may be repeated")
    ] = None,
    device: str = "cpu",
    threads: Annotated[
        int, typer.Option(help="micro-batches at a time on a CPU; 0: one per core")
    ] = 0,
    micro_batch: Annotated[
        int,
        typer.Option(
            help="most tokens of a micro-batch, which bears on speed and memory alone; 0: 1,024 "
            "on a CPU and 16,384 elsewhere"
        ),
    ] = 0,
    save_every: int = 100,
    checkpoint_every: Annotated[
        int, typer.Option(help="steps between checkpoints, folders beside the state; 0: none")
    ] = 0,
) -> None:
    """Train the embedded model and write it as a Hugging Face folder."""
    recipe = Recipe(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        first=first,
        narrow_from=narrow_from,
        hidden_from=hidden_from,
        price=price,
        ramp=(price_from, price_to),
        narrowing=Narrowing(narrow, hidden, forgotten),
        size=Size(blocks, d_model, heads, kv_heads, vocabulary),
        concepts=concepts,
        without=tuple(without or ()),
    )
    train_and_save(
        recipe,
        out,
        state,
        device=device,
        threads=threads or torch.get_num_threads(),
        save_every=save_every,
        micro_batch=micro_batch,
        checkpoint_every=checkpoint_every,
    )


if __name__ == "__main__":
    typer.run(train)
