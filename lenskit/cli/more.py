"""The demonstration, checks and plans of a model, and what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenskit.cli.common import EMBEDDED, Device, ModelName, app, mistakes, show, terminal
from lenskit.concepts import concepts


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pictures and demo.json")] = Path(
        "figures"
    ),
    model: ModelName = EMBEDDED,
    number: Annotated[int, typer.Option("--concepts", help="how many of each class")] = 12,
    work: Annotated[Path, typer.Option(help="folder that keeps what is finished")] = Path(
        "results/demo"
    ),
) -> None:
    """Run the paper's main comparison on the embedded model, offline, and draw it."""
    with mistakes("Run the same command again to go on."):
        from lenskit.study import paired_differences, score_table
        from lenskit.study.demo import PROCESSES, VARIANTS, run_demo, save_demo

        show(
            f"{5 * number} concepts, {len(VARIANTS)} ways to steer each, {PROCESSES} processes; "
            f"finished concepts are kept in {work}"
        )
        found = run_demo(model=model, number=number, work=work, progress=terminal())
        written = save_demo(found, out)
        show(score_table(found.study.compare(), paired_differences(found.study)))
        show(
            "best: each question's best coefficient (optimistic); held out: the coefficient "
            "chosen on two questions and scored on the other three; held out − first: the mean "
            "difference from the first row over the same concepts, and its 95 % interval; "
            "steerable: concepts that any coefficient brings into any answer"
        )
        show(*(f"wrote {path}" for path in written))


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="a local folder, a hub id, or the embedded model")
    ] = EMBEDDED,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, …")] = None,
) -> None:
    """Show what holds on a model: hooks, captures, steering and generation against its own."""
    with mistakes():
        from lenskit.conformance import check as run_checks

        if not run_checks(model, dtype=dtype, device=device):
            raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="a local folder, a hub id, or the embedded model")
    ] = EMBEDDED,
    number: Annotated[int, typer.Option("--concepts", help="how many in the study")] = 60,
    prompts: Annotated[int, typer.Option(help="prompts for each concept")] = 400,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of a prompt, if not those of the grammar's")
    ] = None,
    answers: Annotated[int, typer.Option(help="questions times coefficients")] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 50,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, …")] = None,
) -> None:
    """Estimate the memory and time of a study from a few seconds of the model itself."""
    with mistakes():
        from transformers.utils import logging

        from lenskit.models import load_model
        from lenskit.study.plan import failure_table, plan_table
        from lenskit.study.plan import plan as estimate

        logging.disable_progress_bar()
        loaded = load_model(model, device=device, dtype=dtype, check=False)
        found = estimate(loaded, number, prompts, tokens, answers, max_new_tokens)
        show(plan_table(found))
        if found.failures:
            show(failure_table(found))
            raise typer.Exit(1)


@app.command(name="concepts")
def list_concepts(
    name: Annotated[str, typer.Argument(help="a class, or nothing for all")] = "",
) -> None:
    """List the concept classes, or the concepts of one class."""
    with mistakes():
        for own in [name] if name else concepts:
            group = concepts[own]
            typer.echo(f"{own} ({len(group)}): {group.prefix}")
            typer.echo(f"  {', '.join(group)}" if name else f"  {', '.join(list(group)[:6])}, …")


@app.command()
def version() -> None:
    """Print the version."""
    import lenskit

    typer.echo(f"lenskit {lenskit.__version__}")
