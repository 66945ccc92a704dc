"""``lenskit emphasis``: one question about where a model looks, on tasks of attention steering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lenskit.cli.common import EMBEDDED, Device, ModelName, app, mistakes, terminal
from lenskit.cli.experiment import command_line, save_and_show
from lenskit.concepts import among

TASK_EXPERIMENTS = ("policies", "field", "sources", "heads", "composition")


@app.command()
def emphasis(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(TASK_EXPERIMENTS)}")],
    model: ModelName = EMBEDDED,
    other: Annotated[
        str | None, typer.Option(help="field: another checkpoint, to which all is carried over")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="held-out prompts of each task")] = None,
    samples: Annotated[int | None, typer.Option(help="train prompts of each task")] = None,
    steps: Annotated[int | None, typer.Option(help="of whatever is learnt")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder that keeps what is finished, and the tables")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="answers generated at once")] = 256,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="draws prompts and controls")] = 0,
) -> None:
    """Answer one question about emphasis: which policy, or something else, or which heads.

    policies compares every way to emphasise a span; field sets attention steering beside activation
    steering, soft prompts and changed weights; sources compares where a steering vector comes from;
    heads says what a profile of heads is worth; composition what edits lose beside one another.
    With --out it can be stopped and started again.
    """
    with mistakes("Run the same command again to go on." if out else ""):
        (name,) = among("emphasis", [name], TASK_EXPERIMENTS)
        if other is not None and name != "field":
            raise ValueError(f"--other goes with field, not with {name}")
        from transformers.utils import logging

        import lenskit as lk

        logging.disable_progress_bar()
        numbers = {"number": prompts, "samples": samples, "steps": steps, "seed": seed}
        given: dict[str, Any] = {size: n for size, n in numbers.items() if n is not None}
        sizes = lk.emphasis.Sizes(**given)
        options: dict[str, Any] = {"out": out, "batch_size": batch_size, "progress": terminal()}
        if other is not None:
            options["other"] = lk.load_model(other, device=device)
        options["command"] = command_line(
            "emphasis",
            name,
            model=model if model != EMBEDDED else None,
            other=other,
            prompts=prompts,
            samples=samples,
            steps=steps,
            seed=seed or None,
        )
        loaded = lk.load_model(model, device=device)
        found = lk.emphasis.EXPERIMENTS[name](loaded, sizes, **options)
        save_and_show(found, out)
