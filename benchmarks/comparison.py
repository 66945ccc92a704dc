"""The main comparison: token choice, labels and learners with both scores and the controls.

``python -m benchmarks.comparison`` writes data/results/comparison.md. It can be stopped and
started again; ``--shard 0/2`` and ``--shard 1/2`` run halves as two processes on one ``--work``.

Ways that steer all blocks are compared first. Then ways that steer one: each closing token with its
own vector, and all tokens with the attention-guided one. Their block is chosen on other concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console

from lenskit.concepts import Concept, concepts, read_shard, spread
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
    ("gating", "covariance"),
    ("true activity", "covariance"),
    ("hard", "ridge"),
    ("soft", "ridge"),
    ("hard", "logistic"),
    ("soft", "logistic"),
    ("hard", "pca"),
    ("hard", "rfm"),
    ("soft", "rfm"),
    ("gating", "rfm"),
    ("true activity", "rfm"),
)
VARIANTS = tuple(
    dict.fromkeys(
        (
            *BY_TOKEN,
            *(Variant("attention", labels, learner, "all") for labels, learner in LABELS),
            *(replace(variant, learner="rfm") for variant in BY_TOKEN),
            *(replace(v, labels="hard", learner="mean difference") for v in BY_TOKEN),
            *(replace(v, labels="hard", learner="rfm") for v in BY_TOKEN[:2]),
            *CONTROLLED,
        )
    )
)


LEARNERS = ("covariance", "rfm")  # which every token is read with
# The token's vectors in one block, and the labels that they are compared with.
TOKENS = ("each", "attention")
ONE_BLOCK_LABELS = ("hard", "soft", "gating", "true activity")
ONE_BLOCK_CONTROLS = ("random vector", "shuffled labels")
# A block alone takes more than each of all of them.
ONE_BLOCK = OPTIONS | {"coefficients": (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)}


def in_block(token: str, block: int) -> Variant:
    """The token's vectors in this block alone."""
    return Variant(token, "hard", "covariance", str(block))


def others(number: int, few: int) -> list[Concept]:
    """So many concepts of each class, evenly spaced, that ``spread(name, number)`` leaves out."""
    chosen = []
    for name in concepts:
        taken = spread(name, number)
        left = [one for one in concepts[name].values() if one not in taken]
        if len(left) < few:
            raise ValueError(
                f"class {name} has {len(left)} concepts beside the {number} compared, fewer than "
                f"the {few} that the block is to be chosen on"
            )
        chosen += [left[i * len(left) // few] for i in range(few)]
    return chosen


def best_block(study: Study, token: str) -> int:
    """The block in which the token's vectors have the highest held-out score, the first of equal
    ones."""
    table = study.compare().query("token == @token")
    return int(table.loc[table["held_out"].idxmax(), "blocks"])


def one_block(blocks: Mapping[str, int]) -> tuple[Variant, ...]:
    """The ways that steer one block, given by token."""
    ways = {token: in_block(token, block) for token, block in blocks.items()}
    own = [replace(ways["each"], labels=labels) for labels in ONE_BLOCK_LABELS]
    controls = [replace(ways["each"], control=control) for control in ONE_BLOCK_CONTROLS]
    return tuple(dict.fromkeys((*own, *ways.values(), *controls)))


def markdown(study: Study, head: str) -> str:
    """The table of ``Study.compare`` in per cent, the best rows first, the controls last."""
    table = study.compare().merge(paired_differences(study).drop(columns=["held_out", "concepts"]))
    lines = [
        head,
        "",
        "| token | blocks | labels | learner | best of the coefficients | held out "
        f"| less «{', '.join(table.loc[0, ['token', 'labels', 'learner']])}» | steerable |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
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
        name = [row[key] for key in ("token", "blocks", "labels", "learner")]
        if row["control"]:
            of = "" if still else f", token {name[0]}"
            name = [f"control: {row['control']}{of}", *([""] * 3 if still else name[1:])]
        lines.append(f"| {' | '.join([*name, *scores])} |")
    return "\n".join(lines) + "\n"


def by_token(study: Study, learner: str) -> str:
    """The attention-guided token less each fixed one, soft labels and the same learner."""
    guided = Variant("attention", "soft", learner, "all")
    table = paired_differences(study, guided).query(
        "labels == 'soft' and learner == @learner and blocks == 'all' and control == ''"
    )
    lines = [
        f"The attention-guided token less each fixed one, soft labels, {learner}, held out:",
        "",
        "| token | difference |",
        "| --- | --- |",
    ]
    for row in table[table["token"].str.startswith("-")].to_dict("records"):
        mean, low, high = (-100 * row[key] for key in ("difference", "high", "low"))
        lines.append(f"| {row['token']} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |")
    return "\n".join(lines) + "\n"


def main(
    number: Annotated[int, typer.Option("--concepts", help="of each class")] = 21,
    shard: str = "0/1",
    work: Path = Path("results/comparison"),
    out: Path = Path("data/results/comparison.md"),
    model: str = "lenskit-mini",
    threads: int = 1,
    few: Annotated[int, typer.Option(help="concepts of each class that choose the block")] = 2,
) -> None:
    """Run or go on with the comparison, and write its table once every concept is done."""
    torch.set_num_threads(threads)
    loaded = load_model(model, device="cpu")
    chosen, choosing = [c for name in concepts for c in spread(name, number)], others(number, few)
    mine = read_shard(shard)
    everywhere = [
        in_block(token, block) for token in TOKENS for block in range(loaded.cfg.n_layers)
    ]
    run_study(loaded, choosing[mine], everywhere, out=work / "blocks", **ONE_BLOCK)
    run_study(loaded, chosen[mine], VARIANTS, out=work, **OPTIONS)
    # What other shards have not done yet is done here, since all need the same blocks.
    tried = run_study(loaded, choosing, everywhere, out=work / "blocks", **ONE_BLOCK)
    blocks = {token: best_block(tried, token) for token in TOKENS}
    placed = work / f"one block, {', '.join(f'{t} {b}' for t, b in blocks.items())}"
    run_study(loaded, chosen[mine], one_block(blocks), out=placed, **ONE_BLOCK)
    if any(len(finished(out, chosen)) < len(chosen) for out in (work, placed)):
        Console().print("the other shards are still at work")
        return
    parts = [read_study(out, chosen).answers for out in (work, placed)]
    study = Study(pd.concat(parts, ignore_index=True))
    Console().print(score_table(study.compare(), paired_differences(study)))
    coefficients = OPTIONS["coefficients"]
    head = (
        f"{len(chosen)} concepts, {OPTIONS['prompts']} prompts each, "
        f"{model_fingerprint(loaded)}; in % of questions, ± standard error over concepts. Every "
        f"way of steering has {len(coefficients)} coefficients to choose from, in mean residual "
        f"norms: {', '.join(map(str, coefficients))} for all blocks, "
        f"{', '.join(map(str, ONE_BLOCK['coefficients']))} for one, which is chosen on "
        f"{len(choosing)} other concepts. Token «each»: every closing token its own vector, added "
        "there alone. Differences are of the held out "
        "score over the same concepts, with 95 % bootstrap intervals; steerable: concepts that any "
        "coefficient brings into any answer.\n\n"
        "`python -m benchmarks.comparison`"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join((markdown(study, head), *(by_token(study, learner) for learner in LEARNERS)))
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
