"""The command ``lenskit``: the demonstration, studies of one's own, and what concepts there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lenskit.concepts import (
    among,
    choose_concepts,
    concepts,
    read_blocks,
    read_numbers,
    read_phrases,
    read_shard,
    read_tokens,
)

# Modules that load torch are imported inside the commands that need them.
EMBEDDED = "lenskit-mini"

app = typer.Typer(
    name="lenskit",
    help="Find out how a language model carries a concept, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ModelName = Annotated[
    str, typer.Option("--model", help="a local folder, a hub id, or the embedded model")
]
_settings = {"traceback": False}


@app.callback()
def _main(
    traceback: Annotated[bool, typer.Option(help="show where in the code a mistake arose")] = False,
) -> None:
    _settings["traceback"] = traceback


@contextmanager
def _mistakes(again: str = "") -> Iterator[None]:
    """A user's mistake is one line, and so is what to do after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {again}".strip(), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        from lenskit.models import ModelCheckError

        known = isinstance(
            error, ValueError | LookupError | OSError | ImportError | ModelCheckError
        )
        if _settings["traceback"] or not known:
            raise
        # The text of a KeyError is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        typer.echo(f"Error: {' '.join(text.split())}", err=True)
        raise typer.Exit(1) from None


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
    with _mistakes("Run the same command again to go on."):
        from lenskit.study import paired_differences, score_table
        from lenskit.study.demo import PROCESSES, VARIANTS, run_demo, save_demo

        console = Console()
        console.print(
            f"{5 * number} concepts, {len(VARIANTS)} ways to steer each, {PROCESSES} processes; "
            f"finished concepts are kept in {work}"
        )
        found = run_demo(model=model, number=number, work=work, progress=console.is_terminal)
        console.print(score_table(found.study.compare(), paired_differences(found.study)))
        console.print(
            "best: each question's best coefficient (optimistic); held out: the coefficient "
            "chosen on two questions and scored on the other three; held out − first: the mean "
            "difference from the first row over the same concepts, and its 95 % interval; "
            "steerable: concepts that any coefficient brings into any answer"
        )
        for path in save_demo(found, out):
            console.print(f"wrote {path}")


@app.command()
def study(
    model: ModelName = EMBEDDED,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="a concept class; repeat for more")
    ] = None,
    which: Annotated[
        list[str] | None,
        typer.Option(
            "--concepts", help="a number for each class, all, or names such as fears/spiders"
        ),
    ] = None,
    learner: Annotated[
        list[str] | None, typer.Option(help="rfm, ridge, …; repeat for more")
    ] = None,
    labels: Annotated[list[str] | None, typer.Option(help="soft or hard; repeat for both")] = None,
    token: Annotated[
        list[str] | None, typer.Option(help="attention, or a fixed one such as -1; repeat for more")
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="all, top4, bottom4, random4, or numbers 4,5,6; repeat for more"),
    ] = None,
    coefficients: Annotated[str | None, typer.Option(help="numbers such as 0.1,0.2,0.4")] = None,
    relative: Annotated[
        bool,
        typer.Option("--relative/--absolute", help="coefficients in units of the residual norm"),
    ] = True,
    prompts: Annotated[int, typer.Option(help="prompts for each concept")] = 400,
    controls: Annotated[bool, typer.Option(help="run the controls as well")] = True,
    phrases: Annotated[
        Path | None, typer.Option(help="TOML file: concept name = [phrases that show it]")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th concept from the i-th, for n processes")
    ] = "0/1",
    workers: Annotated[
        int | None, typer.Option(help="processes with a GPU each, or a core without (needs ray)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder that keeps what is finished")] = None,
    batch_size: Annotated[int, typer.Option(help="answers generated at once")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    seed: Annotated[int, typer.Option(help="draws prompts and controls")] = 0,
) -> None:
    """Compare ways to make and to apply concept vectors, over concepts.

    With --out a study can be stopped and started again; the folder then also holds answers.csv
    and summary.csv once it is complete.
    """
    with _mistakes("Run the same command again to go on." if out else ""):
        chosen = choose_concepts(which or ["12"], classes or ())
        own = chosen[read_shard(shard)]
        if len(own) < len(chosen) and out is None:
            raise ValueError("--shard needs --out, the folder in which the shards meet")
        if workers is not None and out is None:
            raise ValueError("--workers needs --out, the folder in which the workers meet")
        if not own:
            raise ValueError(f"--shard {shard} holds none of the {len(chosen)} concepts")
        shown_by = read_phrases(phrases, chosen) if phrases else None
        if shown_by is None and model != EMBEDDED:
            raise ValueError(
                f"--model {model} is not the embedded one, so its answers are judged by phrases: "
                "give --phrases FILE with lines such as spiders = ['web', 'eight legs']"
            )
        numbers = read_numbers(coefficients) if coefficients else None
        tokens, where = read_tokens(token or ["attention"]), read_blocks(blocks or ["all"])

        from transformers.utils import logging

        from lenskit.labels import LABELS
        from lenskit.models import load_model
        from lenskit.scoring import grammar_judge, phrase_judge
        from lenskit.study import (
            CONTROLS,
            finished,
            read_study,
            run_on_workers,
            run_study,
            score_table,
            variants,
            write_tables,
        )
        from lenskit.vectors import LEARNERS

        ways = variants(
            tokens=tokens,
            labels=labels and among("labels", labels, LABELS),
            learners=learner and among("learner", learner, LEARNERS),
            blocks=where,
            controls=CONTROLS if controls else (),
        )
        options: dict[str, Any] = {
            "coefficients": numbers,
            "relative": relative,
            "prompts": prompts,
            "judge": phrase_judge(shown_by) if shown_by else grammar_judge,
            "batch_size": batch_size,
            "seed": seed,
        }
        console = Console()
        logging.disable_progress_bar()
        load = partial(load_model, model, device=device)
        options["progress"] = console.is_terminal
        if workers is not None and out is not None:
            found = run_on_workers(load, own, ways, out=out, workers=workers, **options)
        else:
            found = run_study(load(), own, ways, out=out, **options)
        left = len(chosen) - len(finished(out, chosen)) if out else 0
        if out and len(own) < len(chosen) and not left:
            found = read_study(out, chosen)
        console.print(score_table(found.compare()))
        if left:
            console.print(f"{left} of {len(chosen)} concepts are still to be done by other shards")
        elif out:
            for path in write_tables(found, out):
                console.print(f"wrote {path}")


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="a local folder, a hub id, or the embedded model")
    ] = EMBEDDED,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, …")] = None,
) -> None:
    """Show what holds on a model: hooks, captures, steering and generation against its own."""
    with _mistakes():
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, …")] = None,
) -> None:
    """Estimate the memory and time of a study from a few seconds of the model itself."""
    with _mistakes():
        from transformers.utils import logging

        from lenskit.models import load_model
        from lenskit.study.plan import failure_table, plan_table
        from lenskit.study.plan import plan as estimate

        logging.disable_progress_bar()
        loaded = load_model(model, device=device, dtype=dtype, check=False)
        found = estimate(loaded, number, prompts, tokens, answers, max_new_tokens)
        Console().print(plan_table(found))
        if found.failures:
            Console().print(failure_table(found))
            raise typer.Exit(1)


@app.command(name="concepts")
def list_concepts(
    name: Annotated[str, typer.Argument(help="a class, or nothing for all")] = "",
) -> None:
    """List the concept classes, or the concepts of one class."""
    with _mistakes():
        for own in [name] if name else concepts:
            group = concepts[own]
            typer.echo(f"{own} ({len(group)}): {group.prefix}")
            typer.echo(f"  {', '.join(group)}" if name else f"  {', '.join(list(group)[:6])}, …")


@app.command()
def version() -> None:
    """Print the version."""
    import lenskit

    typer.echo(f"lenskit {lenskit.__version__}")
