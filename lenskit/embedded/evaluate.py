"""What the embedded model shows against its grammar: ``python -m lenskit.embedded.evaluate``.

Every part is kept as it is done, so that a run that was stopped goes on; with ``--write`` the
result becomes the model's ``evaluation.json`` and its card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from lenskit._data import data_path
from lenskit.embedded.card import write_card
from lenskit.embedded.evaluation import (
    BY_CONCEPT,
    FULL,
    PARTS,
    QUICK,
    Row,
    Scale,
    Subject,
    kept,
    rewritten,
    rows,
)


def _weights(folder: Path) -> str:
    """The SHA-256 of the weights, which names what was measured."""
    digest = sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _settings(scale: Scale, seed: int) -> str:
    return sha256(json.dumps([asdict(scale), seed]).encode()).hexdigest()[:8]


def measure(part: str, subject: Subject) -> dict[str, Any]:
    """One part of the evaluation with its seconds of processor time, kept or measured now."""

    def made() -> dict[str, Any]:
        begun = process_time()
        found = dict(PARTS[part](subject))
        return {"found": found, "seconds": process_time() - begun}

    return kept(subject.work / f"{part}.json", made)


def _worker(job: tuple[str, Subject]) -> float:
    """One job in a process of its own: a whole part, or a shard of one, whose concepts it keeps."""
    part, subject = job
    torch.set_num_threads(1)
    begun = process_time()
    if subject.shard == (0, 1):
        return float(measure(part, subject)["seconds"])
    if not (subject.work / f"{part}.json").exists() and subject.concepts:
        PARTS[part](subject)
    return process_time() - begun


def measured(subject: Subject, parts: list[str], workers: int, console: Console) -> dict[str, Any]:
    """The parts, by name, with their seconds: those asked for, and others that are kept already."""
    seconds = dict.fromkeys(parts, 0.0)
    if workers > 1:
        jobs = [
            (part, replace(subject, shard=(i, workers)) if split else subject)
            for part in parts
            for split in [part in BY_CONCEPT]
            for i in range(workers if split else 1)
        ]
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for (part, _), took in zip(jobs, pool.map(_worker, jobs), strict=True):
                seconds[part] += took
    found = {}
    for part in PARTS:
        if part not in parts and not (subject.work / f"{part}.json").exists():
            continue
        found[part] = measure(part, subject)
        if seconds.get(part, 0.0) > found[part]["seconds"]:
            found[part]["seconds"] = seconds[part]
            rewritten(subject.work / f"{part}.json", found[part])
        console.print(f"{part}: {found[part]['seconds']:.0f} s")
    return found


def shown(found: list[Row], title: str) -> Table:
    """The rows for the terminal."""
    table = Table("what", "target", "measured", "n", "", title=title)
    for row in found:
        met = {True: "met", False: "missed", None: ""}[row.met]
        table.add_row(row.what, row.target, row.measured, row.n, met)
    return table


def result(subject: Subject, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What ``evaluation.json`` holds: the table, and all that was measured for it."""
    parts = {part: own["found"] for part, own in found.items()}
    return {
        "weights": _weights(subject.folder),
        "trained": {
            name: value
            for name, value in subject.training.items()
            if isinstance(value, int | float)
        },
        "seed": subject.seed,
        "scale": asdict(subject.scale),
        "rows": [row.json() for row in rows(parts)],
        "parts": parts,
        "seconds": {part: round(own["seconds"], 1) for part, own in found.items()},
    }


def evaluate(
    folder: Annotated[
        Path | None, typer.Option(help="the model; by default the embedded one")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="few concepts and answers: minutes instead of an hour")
    ] = False,
    only: Annotated[
        str, typer.Option(help=f"some of the parts, with commas: {', '.join(PARTS)}")
    ] = "",
    concepts: Annotated[
        int, typer.Option(help="concepts that are steered, a multiple of five; 0: as many as usual")
    ] = 0,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="processes of one thread each")] = 1,
    work: Annotated[
        Path, typer.Option(help="where parts are kept until all of them are done")
    ] = Path(".lenskit-evaluate"),
    device: str = "cpu",
    write: Annotated[
        bool, typer.Option(help="write evaluation.json and the card into the model's folder")
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="an evaluation.json of another seed, for the card; may be repeated"),
    ] = None,
) -> None:
    """Measure the model, print what was measured beside its target, exit with 1 where it misses."""
    folder = folder or data_path("lenskit-mini")
    scale = QUICK if quick else FULL
    if concepts:
        scale = replace(scale, concepts=concepts, optimised=min(concepts, scale.optimised))
    parts = [part.strip() for part in only.split(",")] if only else list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise typer.BadParameter(f"{unknown} are no parts; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    work = work / f"{_weights(folder)[:12]}-{_settings(scale, seed)}"
    subject = Subject(folder, work, scale, seed, device=device)
    console = Console()
    if not subject.truth_is_shared:
        console.print(
            f"{folder} was trained on another table of activity than data/lenskit-mini, whose "
            "truth «gating» and the label «true activity» are measured against; measure it there"
        )
    found = measured(subject, parts, workers, console)
    whole = result(subject, found)
    others = [json.loads(file.read_text()) for file in beside or ()]
    whole["beside"] = [
        {key: other[key] for key in ("trained", "scale", "rows")} for other in others
    ]
    table = [Row(**row) for row in whole["rows"]]
    console.print(shown(table, f"{folder.name} against its grammar"))
    if write:
        (folder / "evaluation.json").write_text(json.dumps(whole, indent=1) + "\n")
        write_card(folder)
    raise typer.Exit(int(any(row.met is False for row in table)))


if __name__ == "__main__":
    typer.run(evaluate)
