"""The embedded model's card: how it was made, and what was measured of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

TRAIN = "python -m lenskit.embedded.train"
EVALUATE = "python -m lenskit.embedded.evaluate"
ABLATE = "python -m lenskit.embedded.ablation"
HEAD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---
# lenskit-mini

A small chat model of lenskit's own grammar: 512 concepts in five classes (fears, moods, places,
experts, personas). With a concept's prefix in the prompt it answers in that concept's voice;
without, it answers neutrally. Because the grammar is known, every answer can be judged exactly.
It knows nothing else, and is of no use outside studies of the method.

Weights, tokenizer and grammar are under the MIT licence, like lenskit itself.
"""


def _facts(values: dict, skip: str = "") -> str:
    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(f"| {key} | {text(value)} |" for key, value in values.items() if key != skip)


def _ablation(file: Path) -> str:
    """A column for each model of the ablation, a row for each figure."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    value = {(row["model"], row["measure"]): float(row["value"]) for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        f"| what | {' | '.join(models)} |",
        f"| --- |{' --- |' * len(models)}",
        *(
            f"| {name} | " + " | ".join(f"{value[m, name]:.2f}" for m in models) + " |"
            for name in dict.fromkeys(row["measure"] for row in rows)
        ),
    ]
    return "\n".join(lines)


def write_card(folder: Path) -> None:
    """Write the folder's ``README.md`` from what was kept of its training and measurements.

    That is ``training.json`` and, where they are there, ``evaluation.json`` and ``ablation.csv``.
    """
    training = json.loads((folder / "training.json").read_text())
    log = training["log"]
    ten = sorted({round(k * (len(log) - 1) / 9) for k in range(10)}) if log else []
    shown = [log[i] for i in ten]
    rows = "\n".join(f"| {e['step']} | {e['loss']:.3f} | {e['seconds'] / 60:.1f} |" for e in shown)
    parts = [
        HEAD,
        f"## Training\n`{TRAIN}`\n\n| what | value |\n| --- | --- |\n{_facts(training, 'log')}\n",
        f"| step | loss (nats per target token) | minutes |\n| --- | --- | --- |\n{rows}\n",
    ]
    if (folder / "evaluation.json").exists():
        found = json.loads((folder / "evaluation.json").read_text())
        parts.append(
            f"## Measured\n`{EVALUATE}`\n\n| what | value |\n| --- | --- |\n{_facts(found)}\n"
        )
    if (folder / "ablation.csv").exists():
        parts.append(
            f"## What each ingredient brings\n`{ABLATE}`: models of reduced size\n\n"
            f"{_ablation(folder / 'ablation.csv')}\n"
        )
    (folder / "README.md").write_text("\n".join(parts))
