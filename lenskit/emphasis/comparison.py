"""Every way to emphasise a span, on the same held-out prompts and on tasks of other kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lenskit._arguments import whole
from lenskit.attention import Heads, Knockout, Pasta, Span
from lenskit.emphasis.choosing import (
    GENTLE,
    OWN,
    SPARING,
    chosen,
    families,
    learnt_way,
    profiled,
    projections_of,
)
from lenskit.emphasis.distractors import distractor_span
from lenskit.emphasis.keeping import Keeping, keeping
from lenskit.emphasis.oracle import oracle
from lenskit.emphasis.tables import by_distance, by_frequency, frame_of, summary
from lenskit.emphasis.trials import training, trials, unrelated
from lenskit.emphasis.ways import (
    Trial,
    Way,
    answered,
    examples_span,
    prompting,
    with_examples,
)
from lenskit.models import model_fingerprint
from lenskit.profiling import random_like
from lenskit.study import experiments
from lenskit.tasks import TaskPrompt

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FEW_SHOT, NOTHING, PASTA = "few-shot", "nothing", "PASTA, profiled heads"
RIVALS = (PASTA, "PASTA, all heads", "InstABoost", "Spotlight, as published", "SEKA")
"""What is published, for a target that compares with the best of it."""
_SHOTS = 3


@dataclass(frozen=True)
class Sizes:
    """How many prompts and steps: for each task, each length, each exercise; for fitting; of Adam.

    ``ks``: numbers of profiled heads that are tried. ``draws``: random sets of heads. ``oracle``:
    the oracle's most heads, how many candidates, and prompts of each task.
    """

    number: int = 32
    nearer: int = 12
    exercises: int = 20
    samples: int = 48
    steps: int = 120
    contrasts: int = 64
    ks: tuple[int, ...] = (4, 8, 16)
    draws: int = 3
    oracle: tuple[int, int, int] = (6, 10, 5)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("number", "samples", "steps", "contrasts", "draws"):
            whole(name, getattr(self, name), 1)
        for name in ("nearer", "exercises", "seed"):
            whole(name, getattr(self, name), 0)


def compare(
    model: TransformerBridge,
    sizes: Sizes | None = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    command: str = "",
) -> experiments.Experiment:
    """All ways to emphasise a span, on the same prompts: policies, texts, knock-out, an oracle.

    Heads, strengths and the learnt bias are chosen on the train prompts of three tasks (a format
    and a rewriting that are asked for far away, and a passage that conflicts with memory); those
    "sparing others" among what costs train exercises two points of 100 at most. They are
    scored on their held-out prompts and on three tasks on which nothing was chosen (a far first
    sentence, the earlier of two requests, a system's rule). Measures: the score on either, fluency
    (n-gram entropy), and the score on exercises that have nothing to do with it, each with the
    exercise's own span. Differences are to correct few-shot examples, and for exercises to nothing.
    Parts: by distance, by frequency in training, what was chosen, and whether the targets are met.

    With ``out`` every part is kept when it is done, and a call that was stopped goes on from there.
    Raises ValueError for sizes that cannot be meant, and for a folder of other settings.
    """
    sizes = Sizes() if sizes is None else sizes
    settings = {"model": model_fingerprint(model), "sizes": asdict(sizes)}
    with keeping("policies", out, settings, progress) as keep:
        tested = trials(sizes.number, sizes.nearer, sizes.exercises, sizes.seed)
        ways = all_ways(model, sizes, tested, keep, batch_size)
        rows = {
            way.name: keep.rows(
                "answers",
                way.name,
                make=partial(answered, model, way, tested, batch_size=batch_size),
            )
            for way in ways
        }
        tried = pd.DataFrame(
            [
                {"family": family, **row}
                for family in families_of(rows)
                for row in keep.rows("chosen", family, make=list)
            ]
        )
        heads = pd.DataFrame(keep.rows("profiled heads", make=list))
        ceiling = pd.DataFrame(keep.rows("oracle", make=list))
    answers = frame_of(rows, tested)
    table = summary(
        answers,
        {
            "profiled": ("profiled", "score", FEW_SHOT),
            "not profiled": ("not profiled", "score", FEW_SHOT),
            "unrelated": ("unrelated", "score", NOTHING),
            "fluency": ("profiled", "fluency", NOTHING),
            "repeated": ("profiled", "repeated", NOTHING),
            "fluency, unrelated": ("unrelated", "fluency", NOTHING),
        },
        seed=sizes.seed,
    )
    return experiments.Experiment(
        "policies",
        "What makes a model look at a part of its prompt?",
        command or "lk.emphasis.compare(model)",
        table,
        FEW_SHOT,
        "way",
        {
            "targets": targets(table),
            "by distance": by_distance(answers, FEW_SHOT, seed=sizes.seed),
            "by frequency": by_frequency(answers, NOTHING, seed=sizes.seed),
            "strengths": tried,
            "heads": heads,
            "oracle": ceiling,
        },
        answers,
        (
            f"{model_fingerprint(model)}; {sizes.number} held-out prompts a task, {sizes.samples} "
            f"train prompts of each profiled task, {_SHOTS} correct examples.",
            "The oracle's heads were chosen on the prompts that they are scored on: optimistic.",
            "Knock-out knows what the distractor is, which no other way is told.",
        ),
        group="task",
        counted="n",
    )


def families_of(rows: dict) -> list[str]:
    """The names of ways whose strength was chosen."""
    known = {*RIVALS, OWN}
    return [
        name
        for name in rows
        if name.removesuffix(SPARING) in known or name.startswith(("Spotlight", "PASTA, prof"))
    ]


def all_ways(
    model: TransformerBridge,
    sizes: Sizes,
    tested: Sequence[Trial],
    keep: Keeping,
    batch_size: int,
) -> list[Way]:
    """Every way of the comparison, fitted and chosen on train prompts."""
    train = training(sizes.samples, sizes.seed)
    every = Heads.all(model)
    order = profiled(model, train, keep, batch_size=batch_size)
    projections = projections_of(model, sizes.contrasts, sizes.seed)
    ks = [k for k in sizes.ks if k < len(every)] or [1]
    policies = chosen(
        model, families(order, ks, projections, every), train, keep, batch_size=batch_size
    )
    pasta = policies[PASTA]
    assert isinstance(pasta.policy, Pasta) and pasta.heads is not None
    learnt = partial(
        learnt_way, model, train, keep, steps=sizes.steps, seed=sizes.seed, batch_size=batch_size
    )
    own = learnt()
    also = []
    if spared := unrelated(sizes.exercises, sizes.seed):
        gentle = families(order, ks, projections, every, GENTLE)
        rivals = {name: gentle[name] for name in RIVALS}
        policies |= chosen(model, rivals, train, keep, others=spared, batch_size=batch_size)
        also = [learnt(others=spared)]
    drawn = random_like(pasta.heads, every, number=sizes.draws, by_block=True, seed=sizes.seed)
    anywhere = random_like(pasta.heads, every, number=1, seed=sizes.seed)
    shown = partial(with_examples, model, _SHOTS, sizes.seed)
    most, candidates, prompts = sizes.oracle
    related = [
        prompt
        for trial in tested
        if trial.role in ("profiled", "not profiled")
        for prompt in trial.task.prompts[:prompts]
    ]
    best = oracle(model, related, pasta.policy, keep, most=most, candidates=candidates)
    return [
        *prompting(model, _SHOTS, sizes.seed),
        *policies.values(),
        *(
            replace(pasta, name=f"PASTA, random heads by block, {i + 1}", heads=heads)
            for i, heads in enumerate(drawn)
        ),
        replace(pasta, name="PASTA, random heads", heads=anywhere[0]),
        Way("knock-out of the distractor", Knockout(), where=knocked),
        replace(pasta, name="PASTA with few-shot", change=shown),
        replace(
            pasta, name="PASTA with few-shot, on the examples", change=shown, where=examples_span
        ),
        own,
        *also,
        replace(own, name=f"{OWN} with few-shot", change=shown),
        *([replace(pasta, name="oracle of heads (optimistic)", heads=best)] if len(best) else []),
    ]


def knocked(model: TransformerBridge, prompt: TaskPrompt, changed: TaskPrompt) -> Span | None:
    """The distractor of a prompt."""
    return distractor_span(model, changed)


def targets(table: pd.DataFrame) -> pd.DataFrame:
    """What the comparison was to show, and whether it does, in points of 100."""
    wide = table[table["task"] == "all"].set_index(["way", "measure"])

    def points(way: str, measure: str, column: str = "mean") -> float:
        key = (way, measure)
        return 100 * float(wide.loc[key, column]) if key in wide.index else float("nan")

    rows = []
    for kind in ("", SPARING):
        known = [way + kind for way in RIVALS if (way + kind, "profiled") in wide.index]
        if not known:
            continue
        for measure in ("profiled", "not profiled"):
            gained = points(PASTA + kind, measure, "difference")
            rows.append(
                {"target": f"{PASTA}{kind}, over few-shot, {measure}", "least": 20.0}
                | {"found": gained}
            )
            best = max(known, key=lambda way: points(way, measure))
            gained = points(OWN + kind, measure) - points(best, measure)
            rows.append(
                {"target": f"{OWN}{kind}, over {best}, {measure}", "least": 5.0, "found": gained}
            )
        for way in (PASTA + kind, OWN + kind):
            lost = points(way, "unrelated", "difference")
            rows.append({"target": f"{way}, unrelated", "least": -2.0, "found": lost})
    return pd.DataFrame(rows).assign(met=lambda own: own["found"] >= own["least"])
