"""``lenskit experiment``: one question about steering, on the embedded model or one's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenskit.cli.common import (
    EMBEDDED,
    Classes,
    ConceptFileName,
    ConceptNames,
    Device,
    ModelName,
    app,
    mistakes,
    show,
    terminal,
)
from lenskit.cli.study import choose, judge_of, refuse_judging_workers
from lenskit.concepts import Concept, among, number_wanted, read_numbers

if TYPE_CHECKING:
    from rich.table import Table

    from lenskit.study import experiments

NAMES = (
    *("tokens", "labels", "blocks", "proxy", "where", "learners", "classes", "cost", "failures"),
    *("open-prefix", "recipe", "loop", "sizes", "beyond-text"),
)
TRAINED = Path(".lenskit-train/sizes")


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(NAMES)}")],
    model: ModelName = EMBEDDED,
    classes: Classes = None,
    which: ConceptNames = None,
    concept_file: ConceptFileName = None,
    coefficients: Annotated[
        str | None, typer.Option(help="the budget of every way to steer, in residual norms")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="prompts for each concept")] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            help="sizes: a model's folder, or one of checkpoint-N folders; repeat. Without it "
            "small models of 4, 8 and 16 blocks are trained"
        ),
    ] = None,
    work: Annotated[
        Path, typer.Option(help="sizes: where models that are trained are kept")
    ] = TRAINED,
    steps: Annotated[
        int | None, typer.Option(help="sizes and beyond-text: steps of a training")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="processes with a GPU each, or a core without")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder that keeps what is finished, and the tables")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="answers generated at once")] = 256,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="draws prompts and controls")] = 0,
) -> None:
    """Answer one question about steering, with controls, intervals and paired differences.

    The concepts are lenskit's own or those of a --concept-file, whose judge then decides. With
    --out the experiment can be stopped and started again; the folder then also holds NAME.csv and
    NAME.md.
    """
    with mistakes("Run the same command again to go on." if out else ""):
        (name,) = among("experiment", [name], NAMES)
        if folder and name != "sizes":
            raise ValueError("--folder goes with the experiment sizes; others have --model")
        if name in ("sizes", "beyond-text") and model != EMBEDDED:
            raise ValueError(
                f"--model is of no use to {name}, "
                + ("which has --folder" if name == "sizes" else "which trains one of its own")
            )
        named = choose(which, classes, concept_file, None, None, None, "4", model)
        if name == "sizes" and named.file and named.file.judge == "likelihood":
            raise ValueError(
                "judge = 'likelihood' needs a model that judges, and sizes has several; "
                "give phrases"
            )
        if workers is not None and out is None:
            raise ValueError("--workers needs --out, the folder in which the workers meet")
        refuse_judging_workers(named, workers)
        judge = judge_of(named, None, model)
        budget = read_numbers(coefficients) if coefficients else None

        from transformers.utils import logging

        from lenskit.models import load_model
        from lenskit.study import experiments

        logging.disable_progress_bar()
        options: dict[str, Any] = {
            **{"coefficients": budget, "prompts": prompts, "batch_size": batch_size, "seed": seed},
            **{"out": out, "workers": workers, "progress": terminal()},
            "statements": (named.file.statements or None) if named.file else None,
        }
        options["command"] = command_line(
            "experiment",
            name,
            model=model if model != EMBEDDED else None,
            folder=folder,
            concept_file=concept_file,
            concepts=which,
            coefficients=coefficients,
            prompts=prompts,
            steps=steps,
            seed=seed or None,
            **{"class": classes},
        )
        if name == "beyond-text":
            names = ("coefficients", "prompts", "seed", "command", "progress")
            given = {key: options[key] for key in names} | {"steps": steps}
            given = {key: value for key, value in given.items() if value is not None}
            found = experiments.beyond_text(**given)
        elif name == "sizes":
            folders = _folders(folder, work, steps, seed)
            models = {
                each: partial(load_model, path, device=device, check="hooks")
                for each, path in folders.items()
            }
            named_some = concept_file or classes or number_wanted(which or ["4"]) is None
            found = experiments.sizes(
                models,
                named.concepts if named_some else _learnt(folders.values(), len(named.concepts)),
                activity=None
                if named.file
                else {each: experiments.trained_on(path) for each, path in folders.items()},
                judge=judge(None),
                **options,
            )
        else:
            load = partial(load_model, model, device=device)
            loaded = load() if workers is None else load
            options["judge"] = judge(loaded if workers is None else None)
            found = experiments.EXPERIMENTS[name](loaded, named.concepts, **options)
        save_and_show(found, out)


def _folders(given: list[Path] | None, work: Path, steps: int | None, seed: int) -> dict[str, Path]:
    """The models of ``sizes``: those given, or small ones that are trained here."""
    from lenskit.study import experiments

    if given:
        return experiments.model_folders(given)
    from dataclasses import replace

    import torch

    from lenskit.embedded.sizes import REDUCED, train_sizes

    recipe = replace(REDUCED, seed=seed, steps=steps or REDUCED.steps)
    return train_sizes(work, recipe=recipe, threads=torch.get_num_threads())


def _learnt(folders: Iterable[Path], number: int) -> list[Concept]:
    from lenskit.embedded.sizes import learnt_by_all

    return learnt_by_all(folders, number)


def save_and_show(found: experiments.Experiment, out: Path | None) -> None:
    """Write the tables into ``out``, where there is one, and show them."""
    # Before anything is printed, which may fail.
    written = found.save(out) if out else []
    show(experiment_table(found), *found.notes, *(f"wrote {path}" for path in written))


def experiment_table(found: experiments.Experiment) -> Table:
    """The experiment for the terminal: means over concepts, and differences to the reference."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    wide, gained = found.wide(), None
    if found.reference:
        chosen = "held out" if "held out" in found.measures else found.measures[0]
        every = found.table[found.group] == "all"
        own = found.table[every & (found.table["measure"] == chosen)]
        columns = ["difference", "difference_low", "difference_high", "reference"]
        gained = own.set_index(found.by)[columns]
    table = Table(title=found.question, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(found.by)
    for column in wide.columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    if gained is not None:
        table.add_column(f"{chosen} − {found.reference}", justify="right")
    for way, row in zip(wide.index, wide.to_numpy(), strict=True):
        cells = ["" if value != value else f"{value:.2f}" for value in row]
        if gained is not None:
            mean, low, high, to = gained.loc[way]
            ends = f" [{low:+.2f}, {high:+.2f}]" if low == low else ""
            cells.append("" if mean != mean or way == to else f"{mean:+.2f}{ends}")
        table.add_row(escape(str(way)), *cells)
    return table


def command_line(command: str, name: str, **options: Any) -> str:
    """The command line that says the same again, wherever its results lie."""
    words = ["lenskit", command, name]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [f"--{option.replace('_', '-')}", str(one)]
    return shlex.join(words)
