"""The recipes over every concept of the grammar: what each reaches, and how long it takes.

    python -m benchmarks.recipes --workers 2

Each recipe is a study of its own: vectors from 160 prompts a concept, five questions answered at
ten coefficients, on so many workers, timed as a whole with the start of the processes. A study
that was stopped goes on and is not timed. The controls of the first recipe are run apart, on some
of the concepts. OUT/main.md has the scores, and where the time went.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from lenskit.cli.experiment import experiment_table
from lenskit.concepts import Concept, concepts, spread
from lenskit.models import load_model, model_fingerprint
from lenskit.recipes import recipes
from lenskit.study import CONTROLS, run_on_workers, variants
from lenskit.study.experiments import Experiment
from lenskit.study.experiments.scores import by_concept, summary

# In the unit of each recipe; of the paper's, which leaves them open, in mean residual norms.
DISPLACEMENTS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
NORMS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.2, 0.3, 0.43)
MINUTES = {"lenskit": 6, "paper": 15}
SCORES = ("best", "held out", "one coefficient", "steerable")


def answered(
    name: str, chosen: Sequence[Concept], controls: bool, work: Path, workers: int, prompts: int
) -> pd.DataFrame:
    """The answers of one recipe, or of its controls, as an experiment has them."""
    folder, times = work / (f"{name} controls" if controls else name), work / "times.json"
    anew, start = not folder.exists(), time.perf_counter()
    own = recipes[name].unit == "displacement"
    ways = variants(name, controls=CONTROLS)
    study = run_on_workers(
        partial(load_model, check=False),
        chosen,
        [way for way in ways if bool(way.control) == controls],
        out=folder,
        workers=workers,
        recipe=name,
        relative=True,
        coefficients=DISPLACEMENTS if own else NORMS,
        prompts=prompts,
        batch_size=512,
    )
    if anew and not controls:
        seconds = {"recipe": name, "whole": time.perf_counter() - start, "workers": workers}
        known = json.loads(times.read_text()) if times.exists() else {}
        times.write_text(json.dumps(known | {name: seconds | dict(study.seconds)}, indent=1))
    way = study.answers["control"].where(study.answers["control"] != "", name)
    return study.answers.assign(way=way, calibrated=False)


def spent(work: Path, number: int) -> pd.DataFrame:
    """Minutes of each recipe's study, and the share of its workers' time that each stage took."""
    times = work / "times.json"
    rows = []
    for name, own in (json.loads(times.read_text()) if times.exists() else {}).items():
        stages = {k: v for k, v in own.items() if k not in ("recipe", "whole", "workers")}
        total = sum(stages.values())
        rows.append(
            {"recipe": name, "concepts": number, "workers": own["workers"]}
            | {"minutes": own["whole"] / 60, "asked": MINUTES.get(name)}
            | {stage: seconds / total for stage, seconds in stages.items()}
        )
    return pd.DataFrame(rows)


def main(
    recipe: Annotated[list[str] | None, typer.Option(help="lenskit, paper, default")] = None,
    number: Annotated[int, typer.Option("--concepts", help="of each class; 0: all")] = 0,
    controlled: Annotated[int, typer.Option(help="concepts of each class with controls")] = 21,
    prompts: int = 160,
    workers: int = 2,
    work: Annotated[Path, typer.Option(help="folder that keeps the answers")] = Path(
        "results/recipes"
    ),
    out: Annotated[Path, typer.Option(help="folder of the tables")] = Path("data/results"),
) -> None:
    """Run every recipe over the concepts, and write the table and the times."""
    names = recipe or ["lenskit", "paper", "default"]
    chosen = [c for name in concepts for c in spread(name, number or len(concepts[name]))]
    some = [c for name in concepts for c in spread(name, controlled)] if controlled else []
    work.mkdir(parents=True, exist_ok=True)
    parts = [answered(name, chosen, False, work, workers, prompts) for name in names]
    if some:
        parts.append(answered(names[0], some, True, work, workers, prompts))
    answers = pd.concat(parts, ignore_index=True)
    table = summary(by_concept(answers), SCORES, reference=names[0])
    model = load_model(check=False)
    parameters = sum(each.numel() for each in model.parameters())
    told = [word for name in recipe or () for word in ("--recipe", name)]
    told += ["--concepts", str(number)] if number else []
    taken = spent(work, len(chosen))
    found = Experiment(
        "main",
        "What do the recipes reach over all concepts, and how long do they take?",
        shlex.join(["python", "-m", "benchmarks.recipes", *told]),
        table.assign(control=[way if way in CONTROLS else "" for way in table["way"]]),
        names[0],
        parts={"time": taken} if len(taken) else {},
        notes=(
            f"{model_fingerprint(model)}, {parameters / 1e6:.1f} M parameters. "
            f"{len(chosen)} concepts, controls of «{names[0]}» on {len(some)}; {prompts} prompts "
            f"each; ten coefficients, in displacements ({', '.join(map(str, DISPLACEMENTS))}) or "
            f"in mean residual norms ({', '.join(map(str, NORMS))}); five questions. Minutes are "
            "of a study with the start of its workers; stages are shares of all their time.",
        ),
    )
    found.save(out)
    Console().print(experiment_table(found))
    if len(taken):
        Console().print(taken.round(2).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
