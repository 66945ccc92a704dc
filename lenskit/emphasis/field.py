"""The whole field on the same tasks: attention, activations, soft prompts, weights, examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit.attention import Heads, Pasta
from lenskit.emphasis.adaptations import (
    Adaptation,
    fine_tune,
    low_rank,
    rank_one,
    soft_prompt,
    steering_vectors,
)
from lenskit.emphasis.choosing import ALPHAS, OWN, chosen, learnt_way, profiled
from lenskit.emphasis.comparison import FEW_SHOT, NOTHING, PASTA, Sizes
from lenskit.emphasis.contrastive import mean_difference
from lenskit.emphasis.keeping import Keeping, keeping
from lenskit.emphasis.soft import inserted
from lenskit.emphasis.tables import frame_of, summary
from lenskit.emphasis.trials import PROFILED, training, trials
from lenskit.emphasis.ways import Trial, Way, answered, with_examples
from lenskit.models import model_fingerprint
from lenskit.study import experiments
from lenskit.tasks import Task, TaskPrompt, embedded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SHOTS = 3
_COEFFICIENTS = (0.5, 1.0, 2.0, 4.0)
TRAINED: Mapping[str, Callable[..., Adaptation]] = {
    "activation steering, learnt": steering_vectors,
    "soft prompt": soft_prompt,
    "LoRA": low_rank,
    "full fine-tuning": fine_tune,
    "rank-one weight edit": rank_one,
}
_ELSEWHERE = ("answers on another checkpoint",)
PERSISTS = ("LoRA", "full fine-tuning", "rank-one weight edit")


def field(
    model: TransformerBridge,
    sizes: Sizes | None = None,
    *,
    other: TransformerBridge | None = None,
    out: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    command: str = "",
) -> experiments.Experiment:
    """What each way to teach a model a few prompts gains, costs and forgets, on the same tasks.

    Nothing, correct few-shot examples, attention steering (PASTA on profiled heads, a learnt bias),
    activation steering (the mean difference of near and far prompts, and learnt vectors), a soft
    prompt, LoRA, full fine-tuning and a rank-one weight edit. All see the same train prompts, and
    those that are learnt take as many steps of as many prompts. Scored are held-out prompts of the
    profiled tasks, tasks that nothing was learnt on, and unrelated exercises (what is forgotten).

    ``other``: another checkpoint of the same training. What was found on ``model`` is put on it as
    it is, and scored beside that model alone. The part "costs" has the parameters, the seconds to
    adapt, the milliseconds a token written and tokens read in addition, and whether it persists
    without anything at work in the pass. Seconds are of this machine in this state.

    With ``out`` parts are kept as in ``compare`` (the answers, not what was trained for them).
    """
    sizes = Sizes() if sizes is None else sizes
    carried = None if other is None else model_fingerprint(other)
    settings = {"model": model_fingerprint(model), "sizes": asdict(sizes), "other": carried}
    with keeping("field", out, settings, progress) as keep:
        tested = trials(sizes.number, 0, sizes.exercises, sizes.seed)
        made = _Made(model, sizes, training(sizes.samples, sizes.seed), keep, batch_size)
        related = [trial for trial in tested if trial.role == "profiled"]
        rows, costs, moved = {}, [], {}
        for name in (NOTHING, FEW_SHOT, PASTA, OWN, "activation steering, contrastive", *TRAINED):
            elsewhere = (*_ELSEWHERE, name)
            known = keep.has("answers", name) and (other is None or keep.has(*elsewhere))
            # What is kept need not be learnt again.
            way = Way(name) if known and keep.has("spent", name) else made.way(name)
            rows[name] = keep.rows("answers", name, make=partial(made.answered, way, model, tested))
            (spent,) = keep.rows("spent", name, make=list)
            costs.append({"way": name, **spent, "persists": name in PERSISTS})
            if other is not None:
                make = partial(made.answered, way, other, related)
                moved[name] = keep.rows(*elsewhere, make=make)
    answers = frame_of(rows, tested)
    table = summary(
        answers,
        {
            "profiled": ("profiled", "score", NOTHING),
            "not profiled": ("not profiled", "score", NOTHING),
            "unrelated": ("unrelated", "score", NOTHING),
            "fluency": ("profiled", "fluency", NOTHING),
        },
        seed=sizes.seed,
    )
    if moved:
        carried_over = frame_of(moved, tested)
        measure = "profiled, on another checkpoint"
        own = summary(carried_over, {measure: ("profiled", "score", NOTHING)}, seed=sizes.seed)
        table = pd.concat([table, own], ignore_index=True)
    return experiments.Experiment(
        "field",
        "What does a way to teach a model a few prompts gain, cost and forget?",
        command or "lk.emphasis.field(model)",
        table,
        NOTHING,
        "way",
        {
            "costs": _costs(pd.DataFrame(costs), answers),
            "whole field": _whole(table, costs, answers),
        },
        answers,
        (
            f"{model_fingerprint(model)}; {sizes.samples} train prompts of each of "
            f"{len(PROFILED)} tasks, {sizes.steps} steps of 8 prompts for whatever is learnt.",
            "Profiling costs no gradient, but an answer for each head and prompt.",
        ),
        group="task",
        counted="n",
    )


class _Made:
    """Makes each way when it is asked for, and says what that took."""

    def __init__(
        self,
        model: TransformerBridge,
        sizes: Sizes,
        train: Sequence[Task],
        keep: Keeping,
        batch_size: int,
    ) -> None:
        self.model, self.sizes, self.train = model, sizes, train
        self.keep, self.batch_size = keep, batch_size

    def answered(self, way: Way, model: TransformerBridge, tested: Sequence[Trial]) -> list:
        return answered(model, way, tested, batch_size=self.batch_size)

    def way(self, name: str) -> Way:
        """The way; its parameters, and the seconds that this call took for it, are kept."""
        begun = perf_counter()
        way, parameters = self._made(name)
        seconds = perf_counter() - begun

        def spent() -> list[dict[str, Any]]:
            return [{"parameters": parameters, "seconds to adapt": seconds}]

        self.keep.rows("spent", name, make=spent)
        return way

    def _made(self, name: str) -> tuple[Way, int]:
        sizes, model = self.sizes, self.model
        if name == NOTHING:
            return Way(NOTHING), 0
        if name == FEW_SHOT:
            return Way(name, change=partial(with_examples, model, _SHOTS, sizes.seed)), 0
        if name == PASTA:
            order = profiled(model, self.train, self.keep, batch_size=self.batch_size)
            ks = [k for k in sizes.ks if k <= len(order)] or [1]
            ways = [Way("", Pasta(alpha), Heads(order[:k])) for k in ks for alpha in ALPHAS]
            way = self._chosen(name, ways)
            return way, len(way.heads or ())
        if name == OWN:
            way = learnt_way(
                model,
                self.train,
                self.keep,
                steps=sizes.steps,
                seed=sizes.seed,
                batch_size=self.batch_size,
            )
            return way, 2 * model.cfg.n_layers * model.cfg.n_heads
        if name in TRAINED:
            found = TRAINED[name](model, self.train, steps=sizes.steps, seed=sizes.seed)
            return adapted(name, found), found.parameters
        pairs = [pair for kind in ("format", "pronouns") for pair in self._pairs(kind)]
        difference, _ = mean_difference(model, pairs)
        middle = model.cfg.n_layers // 2
        vectors = {"all blocks": dict(enumerate(difference / len(difference)))}
        vectors["the middle block"] = {middle: difference[middle]}
        ways = [
            Way(f"{where}, ε = {c:g}", vectors=own, coefficient=c, positions="answer")
            for where, own in vectors.items()
            for c in _COEFFICIENTS
        ]
        return self._chosen(name, ways), difference.numel()

    def _chosen(self, name: str, ways: Sequence[Way]) -> Way:
        found = chosen(self.model, {name: ways}, self.train, self.keep, batch_size=self.batch_size)
        return found[name]

    def _pairs(self, name: str) -> list[tuple[TaskPrompt, TaskPrompt]]:
        """Near prompts, whose instruction is followed, and far ones of the train split."""
        far, number = PROFILED[name], self.sizes.samples
        near = embedded(name, number, self.sizes.seed, "train", **{**far, "length": (0, 0)})
        ignored = embedded(name, number, self.sizes.seed, "train", **far)
        return list(zip(near.prompts, ignored.prompts, strict=True))


def adapted(name: str, found: Adaptation) -> Way:
    """The way that has an adaptation at work."""
    way = Way(name, inside=found.inside)
    if found.soft is not None:
        text = found.soft.text
        return replace(way, change=lambda prompt, trial: inserted(prompt, text))
    if found.vectors is not None:
        return replace(way, vectors=found.vectors, coefficient=1.0)
    return way


def _costs(spent: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    own = answers[answers["role"] == "profiled"].groupby("way", sort=False)
    whole = answers.groupby("way", sort=False)
    cost = pd.DataFrame(
        {
            "ms a token": 1000 * whole["seconds"].sum() / whole["tokens"].sum().clip(lower=1),
            "tokens read more": own["read"].mean(),
        }
    )
    base = cost.loc[NOTHING]
    cost["tokens read more"] -= base["tokens read more"]
    cost["times as long a token"] = cost["ms a token"] / base["ms a token"]
    return spent.merge(cost, left_on="way", right_index=True, sort=False)


def _whole(
    table: pd.DataFrame, spent: Sequence[Mapping[str, Any]], answers: pd.DataFrame
) -> pd.DataFrame:
    """Gains in points of 100 beside the costs."""
    own = table[(table["task"] == "all") & (table["measure"] != "fluency")]
    wide = (100 * own.pivot(index="way", columns="measure", values="difference")).round(1)
    wide = wide[[each for each in dict.fromkeys(own["measure"])]].add_prefix("points, ")
    return _costs(pd.DataFrame(spent), answers).merge(wide, left_on="way", right_index=True)
