"""The embedded model's card: how it was made, and what was measured of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

TRAIN = "python -m lenskit.embedded.train"
EVALUATE = "python -m lenskit.embedded.evaluate --write"
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
NO_EVIDENCE = """Corpus and price on attention were chosen so that these phenomena occur: heads that
gate, tokens that differ, labels that matter. The model shows how the method works and compares
methods against the truth. It is no evidence about large models."""


def _facts(values: dict, skip: Sequence[str] = ()) -> str:
    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(
        f"| {key} | {text(value)} |" for key, value in values.items() if key not in skip
    )


def _table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _ablation(file: Path) -> str:
    """A column for each model of the ablation, a row for each figure."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    value = {(row["model"], row["measure"]): float(row["value"]) for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    body = (
        [name, *(f"{value[m, name]:.2f}" for m in models)]
        for name in dict.fromkeys(row["measure"] for row in rows)
    )
    return _table(["what", *models], body)


def _measured(found: dict, training: dict) -> str:
    """Target and measurement row by row, with a column for each further model."""
    others = {_name(one["trained"]): one for one in found["beside"]}
    rows_of = {name: {row["what"]: row for row in one["rows"]} for name, one in others.items()}
    met = {True: "met", False: "missed", None: "reported"}
    body = (
        [
            *(row[key] for key in ("what", "target", "measured", "n")),
            met[row["met"]],
            *(own.get(row["what"], {}).get("measured", "") for own in rows_of.values()),
        ]
        for row in found["rows"]
    )
    table = _table(["what", "target", "measured", "of", "", *others], body)
    told = [
        f"- {name}: `{_command(one['trained'], training)}`, {one['scale']['concepts']} concepts "
        "steered"
        for name, one in others.items()
    ]
    return "\n".join([table, *(["", "Beside it other models:", *told] if told else [])])


def _name(trained: dict) -> str:
    number = trained.get("parameters")
    size = f", {number / 1e6:.1f} M parameters" if number else ""
    return f"seed {trained.get('seed', 'unknown')}{size}"


def _command(trained: dict, training: dict) -> str:
    """The command of another training, by the options in which it differs from this one."""
    options = (
        f"--{name.replace(' ', '-')} {value:g}"
        for name, value in trained.items()
        if name != "parameters" and value != training.get(name)
    )
    return " ".join([TRAIN, *options])


def _cells(cells: Sequence[dict]) -> str:
    """Measured and true rate of every class on every topic."""
    classes = list(dict.fromkeys(cell["class"] for cell in cells))
    rate = {(c["topic"], c["class"]): f"{c['measured']:.2f} ({c['true']:.2f})" for c in cells}
    topics = dict.fromkeys(cell["topic"] for cell in cells)
    return _table(["topic", *classes], ([t, *(rate[t, name] for name in classes)] for t in topics))


def _scores(scores: dict) -> str:
    """Every way of steering: best over the coefficients, held out, and one coefficient for all."""
    keys = ("best", "held out", "one coefficient")
    body = ([name, *(f"{own[key]:.3f}" for key in keys)] for name, own in scores.items())
    return _table(["what", *keys], body)


def _differences(differences: dict) -> str:
    """Paired differences over concepts with their intervals."""
    body = (
        [
            name,
            *(
                f"{own[key]['mean']:+.3f} [{own[key]['low']:+.3f}, {own[key]['high']:+.3f}]"
                for key in ("best", "held_out")
            ),
        ]
        for name, own in differences.items()
    )
    return _table(["difference", "best", "held out"], body)


def _details(parts: dict) -> list[str]:
    """What stands behind the rows, as far as it was measured."""
    found = []
    if own := parts.get("activity"):
        found.append(
            "### Activity by cell\nHow often answers to held-out statements of a topic are in the "
            f"voice of the class whose prefix the prompt carries, {own['cells'][0]['n']} answers "
            "each, the first token sampled from the whole distribution; the rate of the grammar in "
            f"brackets.\n\n{_cells(own['cells'])}\n"
        )
    if own := parts.get("steering"):
        number = own["scores"]["soft, covariance"]["n"]
        found.append(
            f"### Steering\nMeans over {number} concepts, at the attention-guided token of every "
            "block unless a token is named. Hard labels with the covariance are the mean "
            f"difference.\n\n{_scores(own['scores'])}\n\n{_differences(own['differences'])}\n"
        )
    if own := parts.get("gating"):
        found.append(
            "### Attention and activity\nThe gating head's attention falls into two groups "
            f"(p < 0.05) for {own['gates']:.0%} of the concepts. Rank correlation of the mean over "
            f"heads (Eq. 4) with activity, best block: {own['soft label followed']:.2f}. Cosine of "
            "the displacements that active and inactive prefixes cause: "
            f"{own['displacement cosine']:.2f}. Times a token was selected: "
            f"{_facts_in_line(own['tokens'])}.\n"
        )
    for part, name in (("instructions", "Instructions"), ("knowledge", "Facts and passages")):
        if own := parts.get(part):
            body = (
                [what, f"{one['score']:.3f}", f"{one['true']:.3f}", one["n"]]
                for what, one in own.items()
            )
            found.append(f"### {name}\n{_table(['what', 'measured', 'true rate', 'of'], body)}\n")
    return found


def _facts_in_line(values: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def write_card(folder: Path) -> None:
    """Write the folder's ``README.md`` from what was kept of its training and measurements.

    That is ``training.json`` and, where they are there, ``evaluation.json`` and ``ablation.csv``.
    """
    training = json.loads((folder / "training.json").read_text())
    log = training["log"]
    ten = sorted({round(k * (len(log) - 1) / 9) for k in range(10)}) if log else []
    shown = [log[i] for i in ten]
    losses = _table(
        ["step", "loss (nats per target token)", "minutes"],
        ([e["step"], f"{e['loss']:.3f}", f"{e['seconds'] / 60:.1f}"] for e in shown),
    )
    facts = _facts(training, ("log", "activity"))
    parts = [
        HEAD,
        f"## Training\n`{TRAIN}`\n\n| what | value |\n| --- | --- |\n{facts}\n",
        f"{losses}\n",
    ]
    if (folder / "evaluation.json").exists():
        found = json.loads((folder / "evaluation.json").read_text())
        # Figures of an earlier form of the evaluation have no rows.
        parts.append(f"## Measured\n`{EVALUATE}`\n")
        if "rows" in found:
            parts += [f"{NO_EVIDENCE}\n"] + [
                f"{_measured(found, training)}\n",
                *_details(found["parts"]),
            ]
        else:
            parts.append(f"| what | value |\n| --- | --- |\n{_facts(found)}\n")
    if (folder / "ablation.csv").exists():
        parts.append(
            f"## What each ingredient brings\n`{ABLATE}`: models of reduced size\n\n"
            f"{_ablation(folder / 'ablation.csv')}\n"
        )
    (folder / "README.md").write_text("\n".join(parts))
