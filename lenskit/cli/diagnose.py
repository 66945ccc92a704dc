"""``lenskit diagnose``: why a saved vector does not steer, and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenskit.cli.common import EMBEDDED, ConceptFileName, Device, ModelName, app, mistakes, show
from lenskit.cli.steer import numbered_blocks
from lenskit.concepts import load_concept_file, read_blocks


@app.command()
def diagnose(
    vectors: Annotated[Path, typer.Argument(help="a file of lenskit fit, or of vectors.save")],
    model: ModelName = EMBEDDED,
    coefficient: Annotated[
        float | None, typer.Option(help="the one that was used; without it the direction is judged")
    ] = None,
    blocks: Annotated[str, typer.Option(help="all, from1, or numbers 4,5,6")] = "all",
    relative: Annotated[
        bool | None,
        typer.Option("--relative/--absolute", help="coefficients in units of the residual norm"),
    ] = None,
    concept_file: ConceptFileName = None,
    device: Device = None,
) -> None:
    """Name the likely cause why a vector does not steer, and coefficients or blocks to try.

    Answers are judged by the model's own likelihoods, or as a --concept-file says, whose statements
    the prompts are then made of.
    """
    with mistakes():
        where = read_blocks([blocks])[0]
        if where.startswith(("top", "bottom", "random")):
            raise ValueError(f"--blocks {where} needs an enrichment test; name them: 4,5,6")
        file = load_concept_file(concept_file) if concept_file else None

        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from transformers.utils import logging

        from lenskit.models import load_model
        from lenskit.scoring import file_judge
        from lenskit.study import diagnose as find_cause
        from lenskit.vectors import ConceptVectors

        logging.disable_progress_bar()
        found = ConceptVectors.load(vectors)
        loaded = load_model(model, device=device)
        result = find_cause(
            loaded,
            found,
            coefficient,
            blocks=numbered_blocks(where, loaded.cfg.n_layers),
            relative=relative,
            judge=file_judge(file, loaded) if file else None,
            statements=(file.statements or None) if file else None,
        )
        table = Table(*map(str, result.table.columns), box=SIMPLE_HEAD)
        for row in result.table.itertuples(index=False):
            table.add_row(*(f"{value:.3g}" for value in row))
        show(repr(result), *([table] if len(result.table) else []))
