"""``lenskit figures``: the pictures of all experiments whose tables are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lenskit._data import data_path
from lenskit.cli.common import app, mistakes, show
from lenskit.cli.emphasis import TASK_EXPERIMENTS

_OTHERS = {
    "ablation": "python -m lenskit.embedded.ablation",
    "diagnosis": "python -m benchmarks.diagnosis --out {folder}",
    **{name: f"lenskit emphasis {name} --out {{folder}}" for name in TASK_EXPERIMENTS},
}


@app.command()
def figures(
    results: Annotated[
        Path, typer.Option(help="folder of the tables, or of a folder for each experiment")
    ] = Path("data/results"),
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("figures"),
) -> None:
    """Draw every experiment whose tables are there, as SVG and PNG, and say which are missing.

    Nothing is computed anew. The same tables give the same files, to the byte.
    """
    with mistakes():
        from lenskit.figures import DRAWINGS, draw_experiment, save_figure

        if not results.is_dir():
            raise FileNotFoundError(f"--results {results} is no folder")
        written, missing = [], {}
        for name, drawing in DRAWINGS.items():
            folder = next(_holding(results, drawing.of), None)
            if folder is None:
                missing[name] = drawing.of
                continue
            written += save_figure(draw_experiment(name, folder), out / name)
        show(*(f"wrote {path}" for path in written))
        show(
            *(
                f"{name}: there is no {of}.csv; {_made(name, results)}"
                for name, of in missing.items()
            )
        )


def _holding(results: Path, table: str) -> Iterator[Path]:
    """Folders that hold a table: the one given, those in it, and the embedded model's."""
    inside = sorted(each for each in results.iterdir() if each.is_dir())
    for folder in (results, *inside, data_path("lenskit-mini")):
        if (folder / f"{table}.csv").exists():
            yield folder


def _made(name: str, results: Path) -> str:
    """What to run for it."""
    experiment = name.removesuffix("-causes")
    command = _OTHERS.get(name, f"lenskit experiment {experiment} --out {{folder}}")
    return f"run `{command.format(folder=results)}`"
