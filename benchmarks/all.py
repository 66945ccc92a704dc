"""All benchmarks, one after the other, into data/results/<device>.md.

    python -m benchmarks.all --quick

On a GPU:

    python -m benchmarks.all --device cuda --dtype bfloat16 --shape 8b --share 0.05
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import rich
import torch
import transformers
import typer
from rich.console import Console

from benchmarks import capture, enrichment, generation, growth, measure, patching, pipeline, rfm


def main(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    share: Annotated[float, typer.Option(help="Of the published procedure to run.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("data/results"),
    figure: Annotated[Path, typer.Option(help="Where the picture of growth goes.")] = Path(
        "figures/growth.png"
    ),
) -> None:
    """Run everything, print it, and write the tables."""
    if threads is not None:
        torch.set_num_threads(threads)
    name = measure.machine(device)
    command = shlex.join(["python", "-m", "benchmarks.all", *sys.argv[1:]])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    parts = [
        f"# {name}\n\n`{command}`, {datetime.now(UTC):%Y-%m-%d}, {versions}.\n",
    ]
    for title, work in works(shape, device, dtype, quick, share, figure):
        rich.print(f"[bold]{title}[/bold]")
        parts.append(f"## {title}\n\n{work()}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
    file.write_text("\n".join(parts))
    rich.print(f"wrote {file}")


def works(
    shape: str, device: str, dtype: str, quick: bool, share: float, figure: Path
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Each benchmark's name, and a function that runs it and returns Markdown."""
    options = (shape, device, dtype, quick)
    yield "Capture", lambda: shown(capture.run(*options))
    yield "One concept", lambda: shown(pipeline.run(*options, share=share))
    if shape == "embedded":
        # Wide enough for what the fit saves to show.
        yield (
            "One concept, a wider model",
            lambda: shown(pipeline.run("small", device, dtype, quick, share=0.15, repeats=1)),
        )
    yield "Patching", lambda: shown(patching.run(*options))
    yield "Growth", lambda: shown(growth.run(*options, figure=figure))
    dims, wide = ([256, 1024], 1024) if quick else ([256, 1024, 4096, 8192], 4096)
    span = ["float64", "float32"]
    yield (
        "Recursive Feature Machine, one block",
        lambda: printed(lambda: rfm.main(dims, 400, 1, device, span, None, False, True, None, 3)),
    )
    yield (
        "Recursive Feature Machine, all blocks of a model",
        lambda: printed(
            lambda: rfm.main([wide], 400, 31, device, span, None, False, True, None, 1)
        ),
    )
    prompts, blocks = (100, 8) if quick else (400, 32)
    yield (
        "Permutation tests",
        lambda: printed(
            lambda: enrichment.main(prompts, blocks, 32, 64, 11, 999, 64, device, None, 3)
        ),
    )
    if shape == "embedded":
        rows, tokens = (10, 20) if quick else (50, 50)
        yield (
            "Generation",
            lambda: printed(
                lambda: generation.main("lenskit-mini", device, dtype, rows, tokens, 3)
            ),
        )


def shown(reports: list[measure.Report]) -> str:
    """Print the tables and return them as Markdown."""
    for report in reports:
        report.show()
    return "\n".join(report.markdown() for report in reports)


def printed(work: Callable[[], object]) -> str:
    """What a benchmark prints, as a block of text."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        work()
    Console().print(text.getvalue(), highlight=False, markup=False)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(["```", *(line for line in lines if line), "```", ""])


if __name__ == "__main__":
    typer.run(main)
