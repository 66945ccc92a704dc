"""What each ingredient of the training brings: ``python -m lenskit.embedded.ablation``.

Four models of reduced size, alike but for their ingredients, and the same figures of each. The
trainings are resumable, and a model that is there is not trained again.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.progress import track

from lenskit.embedded.card import write_card
from lenskit.embedded.corpus import FIRST_MIXTURE, MIXTURE
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.masks import Narrowing
from lenskit.embedded.measures import concept_measures, mean_measures, measured_concepts
from lenskit.embedded.recipe import Recipe, Size, with_concepts
from lenskit.embedded.train import train_and_save
from lenskit.models import load_model
from lenskit.scoring import mean_interval

REDUCED = Recipe(
    steps=1300, narrow_from=0.4, hidden_from=0.55, concepts=80, size=Size(blocks=6, d_model=128)
)


def ablated(recipe: Recipe = REDUCED) -> dict[str, Recipe]:
    """The four recipes by name, each with one ingredient more than the one before."""
    names = {task.__name__ for mixture in (FIRST_MIXTURE, MIXTURE) for task in mixture}
    competing = tuple(sorted(name for name in names if name.startswith("competing")))
    plain = replace(recipe, price=0.0, narrowing=replace(recipe.narrowing, hidden=0.0))
    priced = replace(plain, price=recipe.price or Recipe().price)
    return {
        "no competition": replace(plain, without=(*plain.without, *competing)),
        "competition": plain,
        "competition, price": priced,
        "competition, price, tokens hidden": replace(
            priced,
            narrowing=replace(priced.narrowing, hidden=recipe.narrowing.hidden)
            if recipe.narrowing.hidden
            else Narrowing(),
        ),
    }


def measure(folder: Path, recipe: Recipe, number: int, prompts: int) -> list[dict[str, float]]:
    """The figures of the model in ``folder`` for each of ``number`` of the concepts it learnt."""
    model = load_model(folder, dtype=torch.float32, check=False)
    chosen = measured_concepts(with_concepts(load_grammar(), recipe.concepts), number)
    return [
        concept_measures(model, concept, prompts=prompts, seed=recipe.seed)
        for concept in track(chosen, description=folder.name)
    ]


def write_table(file: Path, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """A tidy CSV of each model's rows of concepts: model, measure, value (the mean), the ends of
    its 95 % bootstrap interval, and the number of concepts that have one."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["model", "measure", "value", "low", "high", "concepts"])
        for model, rows in found.items():
            table = pd.DataFrame(rows)
            for name, value in mean_measures(rows).items():
                known = table[name].dropna().to_numpy(dtype=float)
                ends = (f"{end:.4f}" for end in mean_interval(known, draws=2000))
                writer.writerow([model, name, f"{value:.4f}", *ends, len(known)])


def ablation(
    out: Annotated[
        Path, typer.Option(help="folder of the table; its card shows it if it is a model's")
    ] = Path("data/lenskit-mini"),
    work: Annotated[Path, typer.Option(help="where states and models are kept")] = Path(
        ".lenskit-train/ablation"
    ),
    steps: int = REDUCED.steps,
    batch: int = REDUCED.batch,
    concepts: int = REDUCED.concepts,
    blocks: int = REDUCED.size.blocks,
    d_model: int = REDUCED.size.d_model,
    price: float = REDUCED.price,
    seed: int = REDUCED.seed,
    without: Annotated[
        list[str] | None, typer.Option(help="a task that no model learns; may be repeated")
    ] = None,
    measured: Annotated[int, typer.Option(help="concepts measured, evenly over the classes")] = 15,
    prompts: Annotated[int, typer.Option(help="prompts of each concept")] = 160,
    threads: Annotated[int, typer.Option(help="micro-batches at a time; 0: one per core")] = 0,
) -> None:
    """Train the four models, measure them, and write the table."""
    recipe = replace(
        REDUCED,
        steps=steps,
        batch=batch,
        concepts=concepts,
        price=price,
        seed=seed,
        size=replace(REDUCED.size, blocks=blocks, d_model=d_model),
        without=tuple(without or ()),
    )
    threads = threads or torch.get_num_threads()
    found = {}
    for name, variant in ablated(recipe).items():
        folder = work / name.replace(", ", "-").replace(" ", "-")
        train_and_save(variant, folder / "model", folder / "state.safetensors", threads=threads)
        found[name] = measure(folder / "model", variant, measured, prompts)
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "ablation.csv", found)
    if (out / "training.json").exists():
        write_card(out)


if __name__ == "__main__":
    typer.run(ablation)
