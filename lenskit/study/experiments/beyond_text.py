"""The whole method on sequences that are no language, where everything is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit._arguments import positive_numbers, whole
from lenskit._progress import Bars
from lenskit.study.experiments.motif_bench import (
    FIRST,
    MotifBench,
    answered_rightly,
    motif_model,
)
from lenskit.study.experiments.motifs import Motifs, train_motifs
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.scores import summary
from lenskit.study.experiments.setting import BUDGET
from lenskit.study.experiments.ways import ANOTHER

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_CONTROLS = ("unsteered", "prefix in the prompt", "random vector", "shuffled labels", ANOTHER)


def beyond_text(
    model: TransformerBridge | None = None,
    *,
    motifs: int = 6,
    steps: int = 1200,
    prompts: int | None = None,
    tests: int = 24,
    coefficients: Sequence[float] = BUDGET,
    seed: int = 0,
    command: str | None = None,
    progress: bool = True,
) -> Experiment:
    """Motifs planted over a four-letter alphabet: prompts from ids, labels, vectors, enrichment and
    steering, with no text and no tokenizer in use.

    A motif among the letters is the prefix, three closing tokens are the candidates, and an answer
    counts where it is wholly the motif's program (``lenskit.study.experiments.motifs``). The scores
    are those of other experiments over ``tests`` prompts without any motif: "best" coefficient of
    each, and "held out", chosen on others. Every way has the same ``coefficients``, in mean
    residual norms, shared by the blocks that are steered; "prefix in the prompt" plants the motif
    where it is active.

    ``parts``: "labels", AUROC and rank correlation of labels with the activity that was planted;
    "blocks", selected token and enrichment of each; "model", the share of right answers by what was
    planted. ``model``: one trained on these motifs (``train_motifs``); by default a small one is
    trained here in ``steps`` steps of plain torch, seconds to a minute on a free core. ``prompts``
    for each motif: 160. Raises ValueError for numbers that cannot be meant.
    """
    number = 160 if prompts is None else whole("prompts", prompts, 8)
    if number % 2:
        raise ValueError(f"prompts must be even, every other with a motif; got {number}")
    whole("steps", steps, 1)
    whole("tests", tests, 3)
    budget = tuple(sorted(positive_numbers("coefficients", coefficients)))
    world = Motifs.drawn(motifs, seed)
    if model is None:
        model = motif_model(train_motifs(world, steps=steps, seed=seed))
    benches = [MotifBench(model, world, motif, number, tests, seed) for motif in range(motifs)]
    rows: list[dict[str, Any]] = []
    with Bars(disable=not progress) as bar:
        task = bar.add_task("motifs", total=motifs)
        for place, bench in enumerate(benches):
            other = benches[(place + 1) % motifs]
            rows += [
                {**bench.about, "way": name, **scores}
                for name, scores in bench.scores(budget, other).items()
            ]
            bar.advance(task)
    table = summary(pd.DataFrame(rows), ["best", "held out"], seed=seed)
    table = table.assign(control=[way if way in _CONTROLS else "" for way in table["way"]])
    labels = pd.DataFrame([row for bench in benches for row in bench.followed()])
    blocks = pd.DataFrame([row for bench in benches for row in bench.blocks()])
    return Experiment(
        "beyond-text",
        "Does the method find and steer what is no language?",
        command or f"lk.experiments.beyond_text(motifs={motifs}, steps={steps}, seed={seed})",
        table,
        FIRST,
        parts={
            "labels": summary(labels, ["AUROC", "rank correlation"], seed=seed),
            "blocks": summary(blocks, ["enrichment", "selected token"], seed=seed),
            "model": answered_rightly(model, world, seed=seed),
        },
        notes=(
            f"{motifs} motifs of five letters, {number} prompts each, {tests} test prompts; n is"
            " of motifs. Whether one is active was planted, and no label has seen it.",
        ),
    )
