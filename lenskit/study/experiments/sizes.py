"""How a concept's place moves with the model's depth, and when in a training it appears."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.labels import Activity
from lenskit.scoring import Judge, Verdict, grammar_judge
from lenskit.study.experiments.cells import Measure
from lenskit.study.experiments.depth import TOKEN, Depth
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import CONCEPT, by_concept, chosen_elsewhere, summary
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant

_OWN = Variant()
_ALL, _ONE, _PROMPTED = "steered, all blocks", "steered, one block", "prompted"
_STEERED = "steered alone, held out"


def spoken(concept: Concept, question: str, answer: str) -> Verdict:
    """``grammar_judge`` for a model that may not speak the grammar yet: it then scores 0."""
    return grammar_judge(concept, question, answer)


def sizes(
    models: Mapping[str, Model],
    concepts: Iterable[Concept] | Concept,
    *,
    activity: Mapping[str, Activity | None] | None = None,
    out: str | Path | None = None,
    judge: Judge | None = None,
    **options: Any,
) -> Experiment:
    """The recipe's steps block by block on several models: of other depths, or along one training.

    ``models``: by name, each loaded or (better, for they then are in memory one at a time) a
    function that loads it; the first is what others are compared to. ``activity``: the truth that
    each was trained on, by the same names (``trained_on``); without it what a model's own answers
    show is the truth.

    The table has for each model the scores "prompted", "steered, all blocks", "steered, one block"
    (the best of all other concepts), its gating head (the AUROC against the truth, and in how many
    concepts it "gates"), and the relative depth at which enrichment lies and the best block does.
    ``parts["by block"]``: over relative depth (0 the first block, 1 the last) enrichment, selected
    token, soft label and gating head against the truth, the vector's held-out correlation,
    agreement, and the held-out score of the block steered alone (at most eight blocks).
    ``parts["selected tokens"]``: the share of concepts that select each token.

    Other options as in ``tokens``; the judge is the grammar's, of models that may not speak it yet.
    """
    if not models:
        raise ValueError("models is empty; give at least one, by name")
    chosen = [concepts] if isinstance(concepts, Concept) else list(concepts)
    command = options.pop("command", None)
    command = command or f"lk.experiments.sizes({len(models)} models, {len(chosen)} concepts)"
    options["judge"] = spoken if judge is None or judge is grammar_judge else judge
    seed = options.get("seed") or 0
    figures, blocks, tokens = list[pd.DataFrame](), list[pd.DataFrame](), list[pd.DataFrame]()
    notes: list[str] = []
    for name, model in models.items():
        folder = None if out is None else Path(out) / "models" / _folder(name)
        truth = None if activity is None else activity.get(name)
        found = _of(_loaded(model, options), chosen, options | {"out": folder}, truth)
        for table, own in zip((figures, blocks), found[:2], strict=True):
            table.append(own.assign(model=name))
        tokens.append(found[1][found[1]["measure"] == TOKEN].assign(model=name))
        notes.append(f"{name}: {found[2]}")
    rows = pd.concat(figures, ignore_index=True)
    measures = [each for each in rows if each not in (*CONCEPT, "model")]
    table = summary(rows, measures, name="model", seed=seed).rename(columns={"model": "way"})
    return Experiment(
        "sizes",
        "How does the distribution over blocks move with depth or training?",
        command,
        table,
        next(iter(models)),
        "way",
        {
            "by block": _by_block(pd.concat(blocks, ignore_index=True), seed),
            "selected tokens": _shares(pd.concat(tokens, ignore_index=True)),
            "by concept": rows,
        },
        notes=(
            f"{len(chosen)} concepts; relative depth is 0 at the first block and 1 at the last.",
            *notes,
        ),
    )


def model_folders(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Folders of models by name; one that holds folders checkpoint-N stands for these, in order.

    Names are the shortest ends of the paths that differ. Raises ValueError for a folder that is no
    model and holds none, or that is given twice.
    """
    found: list[Path] = []
    for given in map(Path, folders):
        if (given / "config.json").exists():
            found.append(given)
            continue
        kept = [each.parent for each in given.glob("checkpoint-*/config.json")]
        if not kept:
            raise ValueError(
                f"{given} is neither a model's folder (it has no config.json) nor holds folders "
                "checkpoint-N of models"
            )
        found += sorted(kept, key=lambda each: int(each.name.removeprefix("checkpoint-")))
    if len({each.resolve() for each in found}) < len(found):
        raise ValueError(f"a folder is given twice among {', '.join(map(str, found))}")
    paths = [each.resolve() for each in found]
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, found, strict=True))
    return {}


def trained_on(folder: str | Path) -> Activity | None:
    """The rates that a model of the embedded grammar was trained on, as its folder keeps them."""
    file = Path(folder) / "training.json"
    return json.loads(file.read_text(encoding="utf-8")).get("activity") if file.exists() else None


def _loaded(model: Model, options: Mapping[str, Any]) -> Model:
    """The model itself, unless workers load it."""
    if isinstance(model, TransformerBridge) or options.get("workers"):
        return model
    return model()


def _of(
    model: Model, concepts: list[Concept], options: Mapping[str, Any], truth: Activity | None
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """One model: a row for each concept, rows by block, and what it is."""
    with begun("sizes", model, concepts, options) as run:
        alone = [
            Way(f"block {block}", Fitted(replace(_OWN, blocks=str(block))))
            for block in run.shape.some_blocks
        ]
        everything = [Way(_ALL, Fitted(_OWN)), *controls(_OWN, several=False), *alone]
        measure = Measure("depth", Depth(truth))
        run.prepare(*everything, measure)
        answers, measured = run.answers(everything), run.measured(measure)
        one = chosen_elsewhere(answers, {_ONE: [way.name for way in alone]})
        scores = by_concept(pd.concat([answers, one], ignore_index=True))
        last = max(1, run.shape.blocks - 1)
    wide = scores.pivot_table(index=CONCEPT, columns="way", values="held out", sort=False)
    wide = wide.rename(columns={"prefix in the prompt": _PROMPTED})
    whole = measured[measured["block"].isna()].pivot_table(
        index=CONCEPT, columns="measure", values="value", sort=False, dropna=False
    )
    kept = [
        each
        for each in (_PROMPTED, _ALL, _ONE, "unsteered", "random vector", "shuffled labels")
        if each in wide
    ]
    steered = scores[scores["way"].isin([way.name for way in alone])]
    block = steered["way"].str.removeprefix("block ").astype(int)
    steered = steered.assign(
        **{"measure": _STEERED, "block": block, "relative depth": block / last},
        value=steered["held out"],
    )
    columns = [*CONCEPT, "measure", "block", "relative depth", "value"]
    blocks = pd.concat(
        [measured[measured["block"].notna()][columns], steered[columns]], ignore_index=True
    )
    blocks = blocks.astype({"value": float, "block": int})
    figures = wide[kept].join(whole).join(_depths(blocks)).reset_index()
    return figures, blocks, run.shape.model


def _depths(blocks: pd.DataFrame) -> pd.DataFrame:
    """Where in each concept's depth enrichment lies on average, and where the best block does.

    NaN where no block is enriched, or none steers; of equally good blocks their mean.
    """
    rows = {}
    for concept, own in blocks.groupby(CONCEPT, sort=False):
        enriched = own[own["measure"] == "enrichment"]
        steered = own[own["measure"] == _STEERED].dropna(subset=["value"])
        total = float(enriched["value"].sum())
        best = steered[steered["value"] == steered["value"].max()]
        rows[concept] = {
            "depth of enrichment": float((enriched["value"] * enriched["relative depth"]).sum())
            / total
            if total > 0
            else float("nan"),
            "depth of the best block": float(best["relative depth"].mean())
            if len(best) and float(best["value"].iloc[0]) > 0
            else float("nan"),
        }
    index = pd.MultiIndex.from_tuples(list(rows), names=CONCEPT)
    return pd.DataFrame(list(rows.values()), index=index)


def _by_block(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over concepts with intervals, of every measure at every block of every model."""
    keys = ["model", "block", "relative depth"]
    parts = []
    for measure, own in rows.groupby("measure", sort=False):
        own = own.assign(site=own["model"] + ", block " + own["block"].astype(str))
        table = summary(own.rename(columns={"value": measure}), [measure], name="site", seed=seed)
        if not len(table):
            continue  # no concept has this measure, such as the AUROC of prompts that are alike
        about = own.drop_duplicates("site")[["site", *keys]]
        parts.append(table.merge(about, on="site", how="left"))
    columns = ["concept_class", *keys, "measure", "mean", "low", "high", "concepts"]
    return pd.concat(parts, ignore_index=True)[columns]


def _shares(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["model", "block", "relative depth"]
    grouped = rows.assign(token=rows["value"].astype(int)).groupby(keys, sort=False)["token"]
    shares = grouped.value_counts(normalize=True).rename("share").reset_index()
    counts = grouped.size().rename("concepts").reset_index()
    return shares.merge(counts, on=keys)


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
