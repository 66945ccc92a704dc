"""Answers of several ways compared: means with intervals, and differences over the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from lenskit.embedded.tasks.people import frequency
from lenskit.emphasis.ways import Trial
from lenskit.scoring import mean_interval
from lenskit.study import Row

DRAWS = 2000
_TASK = ["task", "prompt"]


def frame_of(rows: Mapping[str, Sequence[Row]], trials: Iterable[Trial]) -> pd.DataFrame:
    """Every answer with its way, role, distance and frequency, a row each."""
    about = []
    for trial in trials:
        for place, prompt in enumerate(trial.task.prompts):
            known = prompt.metadata
            rank = known.get("rank")
            about.append(
                {"task": trial.name, "prompt": place, "role": trial.role}
                | {"family": known.get("family", ""), "kind": str(known.get("kind", ""))}
                | {"length": known.get("length"), "rank": rank, "rate": prompt.rate}
                | {"frequency": None if rank is None else frequency(rank)}
            )
    told = pd.DataFrame([{"way": way} | row for way, own in rows.items() for row in own])
    return told.merge(pd.DataFrame(about), on=_TASK, how="inner", sort=False)


def compared(answers: pd.DataFrame, value: str, reference: str, *, seed: int = 0) -> pd.DataFrame:
    """A row for each way: the mean of a column with its 95 % interval, and less ``reference``.

    The ``difference`` is over the prompts that both have.
    """
    own = answers.set_index(_TASK)
    groups = {str(way): part[value].astype(float) for way, part in own.groupby("way", sort=False)}
    base = groups[reference]
    rows = []
    for way, values in groups.items():
        low, high = mean_interval(values.to_numpy(), draws=DRAWS, seed=seed)
        gained = (values - base.reindex(values.index)).dropna().to_numpy()
        ends = mean_interval(gained, draws=DRAWS, seed=seed)
        rows.append(
            {"way": way, "mean": values.mean(), "low": low, "high": high, "n": len(values)}
            | {"difference": gained.mean() if len(gained) else float("nan")}
            | {"difference_low": ends[0], "difference_high": ends[1], "reference": reference}
        )
    return pd.DataFrame(rows)


def summary(
    answers: pd.DataFrame, measures: Mapping[str, tuple[str, str, str]], *, seed: int = 0
) -> pd.DataFrame:
    """``measures``: by name, the role whose answers count, the column, and the reference.

    Rows of the task "all" are over all tasks of the role, which have as many prompts each.
    """
    parts = []
    for measure, (role, value, reference) in measures.items():
        own = answers[answers["role"] == role]
        if not len(own):
            continue
        groups = {"all": own, **dict(list(own.groupby("task", sort=False)))}
        for task, part in groups.items():
            found = compared(part, value, reference, seed=seed)
            parts.append(found.assign(task=task, measure=measure))
    whole = pd.concat(parts, ignore_index=True)
    first = ["task", "way", "measure"]
    return whole[[*first, *(name for name in whole if name not in first)]]


def by_groups(
    answers: pd.DataFrame, group: pd.Series, reference: str, name: str, *, seed: int = 0
) -> pd.DataFrame:
    """``compared`` for each value of ``group``, in a column ``name``; missing ones are left out."""
    parts = []
    for value, part in answers.groupby(group, sort=True):
        found = compared(part, "score", reference, seed=seed)
        parts.append(found.assign(**{name: value, "rate": part["rate"].mean()}))
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    return whole[[name, *(each for each in whole if each != name)]]


def by_distance(answers: pd.DataFrame, reference: str, *, seed: int = 0) -> pd.DataFrame:
    """By family and the tokens between span and question; ``rate`` is the corpus's own."""
    own = answers[answers["length"].notna() & (answers["family"] != "")]
    edges = [-1, 0, 40, 100, 10_000]
    names = ["none", "1 to 40", "41 to 100", "over 100"]
    bins = pd.cut(own["length"].astype(float), edges, labels=names)
    parts = []
    for family, part in own.groupby("family", sort=False):
        found = by_groups(part, bins[part.index].astype(str), reference, "tokens", seed=seed)
        parts.append(found.assign(family=family))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def by_frequency(answers: pd.DataFrame, reference: str, *, seed: int = 0) -> pd.DataFrame:
    """Conflicting passages by how often the person was met in training, in four equal parts.

    ``rate`` is that at which the corpus follows the passage; ``frequency`` the mean share of
    training's draws.
    """
    own = answers[(answers["role"] == "profiled") & answers["rank"].notna()]
    if not len(own):
        return pd.DataFrame()
    ranks = own["rank"].astype(int)
    bins = pd.qcut(ranks, 4, labels=False, duplicates="drop")
    said = {
        part: f"{part + 1}: ranks {ranks[bins == part].min()} to {ranks[bins == part].max()}"
        for part in sorted(bins.unique())
    }
    found = by_groups(own, bins.map(said), reference, "frequency of the person", seed=seed)
    shares = own.groupby(bins.map(said))["frequency"].mean()
    return found.assign(frequency=found["frequency of the person"].map(shares))
