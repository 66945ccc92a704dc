"""The main comparison: token choice, labels and learners with both scores and the controls.

``python -m benchmarks.comparison`` writes benchmarks/results/comparison.md. It can be stopped and
started again; ``--shard 0/2`` and ``--shard 1/2`` run halves as two processes on one ``--work``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lenskit.concepts import concepts, read_shard, spread
from lenskit.models import load_model, model_fingerprint
from lenskit.study import (
    Study,
    Variant,
    finished,
    paired_differences,
    read_study,
    run_study,
    score_table,
)
from lenskit.study.demo import BY_TOKEN, CONTROLLED, OPTIONS

LABELS = (
    ("hard", "mean difference"),
    ("soft", "covariance"),
    ("hard", "ridge"),
    ("soft", "ridge"),
    ("hard", "logistic"),
    ("soft", "logistic"),
    ("hard", "pca"),
    ("hard", "rfm"),
    ("soft", "rfm"),
)
VARIANTS = tuple(
    dict.fromkeys(
        (
            *BY_TOKEN,
            *(Variant("attention", labels, learner, "all") for labels, learner in LABELS),
            *(replace(variant, learner="rfm") for variant in BY_TOKEN),
            *CONTROLLED,
        )
    )
)


def markdown(study: Study, head: str) -> str:
    """The table of ``Study.compare`` in per cent, the best rows first, the controls last."""
    table = study.compare().merge(paired_differences(study).drop(columns=["held_out", "concepts"]))
    lines = [
        head,
        "",
        "| token | labels | learner | best of the coefficients | held out "
        f"| less «{', '.join(table.loc[0, ['token', 'labels', 'learner']])}» | steerable |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    table = table.assign(controlled=table["control"] != "")
    for row in table.sort_values(["controlled", "held_out"], ascending=[True, False]).to_dict(
        "records"
    ):
        scores = [
            f"{100 * row[key]:.1f} ± {100 * row[f'{key} ±']:.1f}" for key in ("best", "held_out")
        ]
        ends = [f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high")]
        scores += [f"{ends[0]} [{ends[1]}, {ends[2]}]", f"{100 * row['steerable']:.0f} %"]
        still = row["control"] in ("unsteered", "prompted")
        name = (row["token"], row["labels"], row["learner"])
        shown = (f"control: {row['control']}", *(("", "") if still else name[1:]))
        lines.append(f"| {' | '.join([*(shown if row['control'] else name), *scores])} |")
    return "\n".join(lines) + "\n"


def main(
    number: Annotated[int, typer.Option("--concepts", help="of each class")] = 21,
    shard: str = "0/1",
    work: Path = Path("results/comparison"),
    out: Path = Path("benchmarks/results/comparison.md"),
    model: str = "lenskit-mini",
    threads: int = 1,
) -> None:
    """Run or go on with the comparison, and write its table once every concept is done."""
    torch.set_num_threads(threads)
    loaded = load_model(model, device="cpu")
    chosen = [concept for name in concepts for concept in spread(name, number)]
    run_study(loaded, chosen[read_shard(shard)], VARIANTS, out=work, **OPTIONS)
    if len(finished(work, chosen)) < len(chosen):
        Console().print("the other shards are still at work")
        return
    study = read_study(work, chosen)
    Console().print(score_table(study.compare(), paired_differences(study)))
    coefficients = OPTIONS["coefficients"]
    head = (
        f"{len(chosen)} concepts, {OPTIONS['prompts']} prompts each, "
        f"{model_fingerprint(loaded)}; in % of questions, ± standard error over concepts. All "
        "blocks are steered, and every way of steering has the same "
        f"{len(coefficients)} coefficients to choose from: "
        f"{', '.join(map(str, coefficients))} mean residual norms. Differences are of the held out "
        "score over the same concepts, with 95 % bootstrap intervals; steerable: concepts that any "
        "coefficient brings into any answer.\n\n"
        "`python -m benchmarks.comparison`"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(study, head), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
