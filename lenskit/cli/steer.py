"""``lenskit fit`` keeps the vectors of a concept, and ``lenskit steer`` shows what they do."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from lenskit.cli.common import (
    EMBEDDED,
    ConceptFileName,
    Device,
    ModelName,
    NamedBlocks,
    Prefix,
    RecipeName,
    Relative,
    app,
    mistakes,
    show,
    terminal,
)
from lenskit.cli.study import choose
from lenskit.concepts import among, read_blocks, read_numbers, read_tokens


@app.command()
def fit(
    out: Annotated[Path, typer.Argument(help="the file to write: NAME.safetensors")],
    model: ModelName = EMBEDDED,
    concept: Annotated[
        str | None, typer.Option(help="fears/spiders, or a name in the --concept-file")
    ] = None,
    concept_file: ConceptFileName = None,
    prefix: Prefix = None,
    recipe: RecipeName = None,
    learner: Annotated[str | None, typer.Option(help="rfm, ridge, …")] = None,
    labels: Annotated[str | None, typer.Option(help="soft or hard")] = None,
    token: Annotated[
        str | None, typer.Option(help="attention, each, or a fixed one such as -1")
    ] = None,
    prompts: Annotated[int, typer.Option(help="prompts")] = 400,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="draws prompts")] = 0,
) -> None:
    """Learn a concept's vector for every block, and write them to a file.

    With --recipe lenskit it first looks where the model keeps the concept, and says what it chose.
    """
    with mistakes():
        which = [concept] if concept else None
        if not (concept or concept_file or prefix):
            raise ValueError("say which concept: --concept fears/spiders, --prefix or a file")
        named = choose(which, None, concept_file, prefix, None, None, "")
        if len(named.concepts) > 1:
            names = ", ".join(one.name for one in named.concepts[:5])
            raise ValueError(f"--concept says which of {len(named.concepts)}: {names}, …")
        tokens = read_tokens([token])[0] if token else None
        if not out.parent.is_dir():
            raise FileNotFoundError(f"{out.parent} is not a folder to write {out.name} to")

        from transformers.utils import logging

        from lenskit.capture import capture
        from lenskit.labels import LABELS
        from lenskit.models import load_model
        from lenskit.prompts import build_prompts, with_separator
        from lenskit.recipes import find_recipe
        from lenskit.study import look
        from lenskit.vectors import LEARNERS, fit_vectors

        known = find_recipe(recipe)
        known = replace(known, token=tokens or known.token, labels=labels or known.labels)
        if learner:
            among("learner", [learner], LEARNERS)
        if labels:
            among("labels", [labels], LABELS)
        logging.disable_progress_bar()
        loaded = load_model(model, device=device)
        statements = (named.file and named.file.statements) or None
        number = min(prompts, len(statements)) if statements else prompts
        made = build_prompts(
            loaded, named.concepts[0], number=number, statements=statements, seed=seed
        )
        made = with_separator(loaded, made) if known.separator else made
        seen = capture(loaded, made, progress=terminal())
        looked = None if known.settled else look(loaded, seen, recipe=known, seed=seed)
        known = known if looked is None else looked.recipe
        vectors = fit_vectors(
            seen, learner=learner, recipe=known, model=loaded, seed=seed, progress=terminal()
        )
        vectors.save(out)
        show(
            f"wrote {out}: {len(vectors.directions)} blocks, {vectors.learner}, "
            f"{vectors.labels} labels",
            f"token: {vectors.selection}",
            *([] if looked is None else [f"looked: {looked.why}"]),
        )


@app.command()
def steer(
    vectors: Annotated[Path, typer.Argument(help="a file of lenskit fit, or of vectors.save")],
    model: ModelName = EMBEDDED,
    question: Annotated[
        list[str] | None, typer.Option(help="repeat for more; by default the concept's own")
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="numbers such as 0.1,0.2; negative ones suppress")
    ] = None,
    blocks: NamedBlocks = "all",
    recipe: RecipeName = None,
    relative: Relative = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 50,
    device: Device = None,
) -> None:
    """Print a model's answers unsteered and, below them, steered by a saved vector."""
    with mistakes():
        from lenskit.recipes import find_recipe, recipes

        known = find_recipe(recipe)
        absolute = "--absolute" if relative is False else f"--recipe {known.name}"
        relative = known.relative if relative is None else relative
        if coefficients is None and not relative:
            raise ValueError(f"{absolute} needs --coefficients, which depend on the model")
        where = read_named_blocks(blocks)

        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
        from transformers.utils import logging

        from lenskit.generation import SteeringRow, generate_steered
        from lenskit.models import load_model
        from lenskit.vectors import ConceptVectors

        logging.disable_progress_bar()
        found = ConceptVectors.load(vectors)
        displaced = found.displacement is not None
        if recipe is None and displaced:
            known = recipes["lenskit"]
        numbers = read_numbers(coefficients) if coefficients else known.coefficients
        asked = tuple(question or found.concept.questions)
        if not asked:
            raise ValueError(f"{vectors} holds no questions; ask some with --question")
        loaded = load_model(model, device=device)
        found.check_model(loaded)
        rows = [
            SteeringRow(one, found if number else None, number)
            for one, number in product(asked, (0.0, *(n for n in numbers if n)))
        ]
        answers = generate_steered(
            loaded,
            rows,
            blocks=numbered_blocks(where, loaded.cfg.n_layers),
            relative=relative,
            recipe=None if recipe is None else known,
            max_new_tokens=max_new_tokens,
            progress=terminal(),
        )
        unit = "displacements" if displaced else "mean residual norms"
        unit = unit if relative else "absolute"
        table = Table(
            title=f"{found.concept.name}: answers by coefficient ({unit})",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("coefficient", justify="right", no_wrap=True)
        table.add_column("answer", overflow="fold")
        for row, answer in zip(rows, answers, strict=True):
            if not row.coefficient:
                table.add_section()
                table.add_row("", Text(_visible(str(row.question)), style="bold"))
            table.add_row(
                f"{row.coefficient:g}" if row.coefficient else "unsteered", Text(_visible(answer))
            )
        show(table)


def read_named_blocks(text: str) -> str:
    """--blocks of a saved vector, read; raises ValueError for those that a test would choose."""
    where = read_blocks([text])[0]
    if where.startswith(("top", "bottom", "random")):
        raise ValueError(f"--blocks {where} needs an enrichment test; name them: 4,5,6")
    return where


def numbered_blocks(spec: str, number: int) -> list[int] | None:
    """The blocks of "from1" or "4,5,6" in a model of so many; ``None`` for "all"."""
    if spec == "all":
        return None
    if spec.startswith("from"):
        return list(range(int(spec.removeprefix("from")), number))
    return [int(block) for block in spec.split(",")]


def _visible(text: str) -> str:
    """What a model wrote, without what would command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
