"""Where a steering vector comes from: contrast, labels, causal sites or gradients, in one study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit import causal
from lenskit.emphasis.adaptations import steering_vectors
from lenskit.emphasis.choosing import chosen
from lenskit.emphasis.comparison import NOTHING, Sizes
from lenskit.emphasis.contrastive import Pair, last_states, without_span
from lenskit.emphasis.keeping import Keeping, keeping
from lenskit.emphasis.planted import SHARES, planted
from lenskit.emphasis.tables import compared, frame_of, summary
from lenskit.emphasis.ways import Trial, Way, answered
from lenskit.models import model_fingerprint
from lenskit.study import Row, experiments
from lenskit.tasks import Task, embedded
from lenskit.vectors import Logistic

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KINDS: Mapping[str, tuple[str, str]] = {
    "json": ("format", "json"),
    "xml": ("format", "xml"),
    "they": ("pronouns", "they"),
    "formal": ("register", "formal"),
    "casual": ("register", "casual"),
}
"""What is asked for by a line that is then left out: the task and its kind."""
LEARNT = "learnt (ceiling)"
SOURCES = ("contrastive", "supervised", "causal", LEARNT)
TOLD = "told (the instruction)"
_COEFFICIENTS = (0.25, 0.5, 1.0, 2.0)

Vectors = Float[Tensor, "block d_model"]


def sources(
    model: TransformerBridge,
    sizes: Sizes | None = None,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    out: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    command: str = "",
) -> experiments.Experiment:
    """Vectors of four sources, of the same pairs and with the same coefficients, for ``kinds``.

    A pair is a prompt with an instruction («as JSON») and without it. "contrastive": the mean
    difference of ``resid_post`` at the last tokens; "supervised": logistic regression that tells
    them apart there; "causal": the mean of clean minus corrupt at the position whose patch restores
    most (``lk.causal.fit_vectors``). A vector is of unit norm, and added to the tokens that the
    answer is written from, in one block or in all, in units of the block's mean norm; where and how
    much is chosen among the same settings by the score on the pairs' own prompts. "learnt
    (ceiling)": vectors of all blocks, of any length, by gradient descent on the targets. Scored are
    held-out prompts without the instruction; "told" are those with it.

    The part "planted bias": pairs behind a sentence about a woman in a share of the prompts with
    the instruction (and about a man without it), 0.5 of which plants nothing. The vectors of every
    source are then added where a story goes on with «She» or «He»: ``she`` is the share of «She»,
    ``amplified`` how far it moved from that at a share of 0.5, over how far the share did.

    With ``out`` parts are kept as in ``compare``. Raises ValueError for kinds that are not known.
    """
    sizes = Sizes() if sizes is None else sizes
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds {unknown} are not known; there are {', '.join(KINDS)}")
    settings = {"model": model_fingerprint(model), "sizes": asdict(sizes), "kinds": list(kinds)}
    bias: list[pd.DataFrame] = []
    rows: dict[str, list[Row]] = {}
    tested: list[Trial] = []
    picked: list[dict] = []
    with keeping("sources", out, settings, progress) as keep:
        for kind in kinds:
            study = _Kind(model, kind, sizes, keep, batch_size)
            tested.append(study.tested)
            for name, way in study.ways().items():
                own = keep.rows("answers", kind, name, make=partial(study.answered, way))
                rows.setdefault(name, []).extend(own)
            picked += study.picked()
        if "json" in kinds:
            study = _Kind(model, "json", sizes, keep, batch_size)
            bias.append(_bias(study))
    answers = frame_of(rows, tested)
    table = summary(
        answers,
        {
            "score": ("steered", "score", NOTHING),
            "fluency": ("steered", "fluency", NOTHING),
            "repeated": ("steered", "repeated", NOTHING),
        },
        seed=sizes.seed,
    )
    return experiments.Experiment(
        "sources",
        "Which source gives the better steering vector?",
        command or "lk.emphasis.sources(model)",
        table,
        NOTHING,
        "way",
        {"settings chosen": pd.DataFrame(picked), **({"planted bias": bias[0]} if bias else {})},
        answers,
        (
            f"{model_fingerprint(model)}; {sizes.samples} pairs and {sizes.number} held-out "
            "prompts of each kind.",
        ),
        group="task",
        counted="n",
    )


class _Kind:
    """One kind of instruction: its pairs, its vectors by source, and its held-out prompts."""

    def __init__(
        self, model: TransformerBridge, kind: str, sizes: Sizes, keep: Keeping, batch_size: int
    ) -> None:
        self.model, self.kind, self.sizes, self.keep = model, kind, sizes, keep
        self.batch_size = batch_size
        self.told = self._task(sizes.number, "held_out")
        train = self._task(sizes.samples, "train").prompts
        self.pairs: list[Pair] = [(prompt, without_span(prompt)) for prompt in train]
        bare = tuple(without_span(prompt) for prompt in self.told.prompts)
        self.tested = Trial(replace(self.told, prompts=bare), "steered")

    def _task(self, number: int, split: str) -> Task:
        task, kind = KINDS[self.kind]
        given = {"system": False} if task == "register" else {"length": (0, 0)}
        found = embedded(task, number, self.sizes.seed, split, kind=kind, **given)
        return replace(found, name=self.kind)

    def answered(self, way: Way, trial: Trial | None = None) -> list[Row]:
        if way.name == TOLD:
            trial = Trial(self.told, "steered")
        given = self.tested if trial is None else trial
        return answered(self.model, way, [given], batch_size=self.batch_size)

    def ways(self) -> dict[str, Way]:
        """Nothing, the instruction itself, and the best setting of each source."""
        found = {name: self.way(name, self.pairs) for name in SOURCES}
        return {NOTHING: Way(NOTHING), TOLD: Way(TOLD), **found}

    def way(self, source: str, pairs: Sequence[Pair], label: str = "") -> Way:
        """The setting of a source that does best on the pairs' own prompts."""
        name = f"{source} {self.kind} {label}".strip()
        vectors, norms = self._kept(name, source, pairs)
        bare = replace(self.tested.task, prompts=tuple(corrupt for _, corrupt in self.pairs))
        ways = self._settings(vectors, norms)
        if source == LEARNT:
            own = dict(enumerate(vectors))
            ways = [
                Way(f"as learnt, times {c:g}", vectors=own, coefficient=c, positions="answer")
                for c in _COEFFICIENTS
            ]
        found = chosen(self.model, {name: ways}, [bare], self.keep, batch_size=self.batch_size)
        return replace(found[name], name=source)

    def _settings(self, vectors: Vectors, norms: Float[Tensor, " block"]) -> list[Way]:
        blocks = range(len(vectors))
        scaled = vectors * norms[:, None]
        some = sorted({len(vectors) // 4, len(vectors) // 2, 3 * len(vectors) // 4})
        where: dict[str, dict[int, Tensor]] = {f"block {b}": {b: scaled[b]} for b in some}
        where["all blocks"] = {b: scaled[b] / len(vectors) ** 0.5 for b in blocks}
        return [
            Way(f"{name}, ε = {c:g}", vectors=own, coefficient=c, positions="answer")
            for name, own in where.items()
            for c in _COEFFICIENTS
        ]

    def picked(self) -> list[dict]:
        """What was tried of each source, and how it did."""
        found = []
        for source in SOURCES:
            rows = self.keep.rows("chosen", f"{source} {self.kind}", make=list)
            found += [{"kind": self.kind, "source": source, **row} for row in rows]
        return found

    def _kept(
        self, name: str, source: str, pairs: Sequence[Pair]
    ) -> tuple[Vectors, Float[Tensor, " block"]]:
        def make() -> list[Row]:
            vectors, norms = self._fit(source, pairs)
            return [{"vectors": vectors.tolist(), "norms": norms.tolist()}]

        (row,) = self.keep.rows("vectors", name, make=make)
        return torch.tensor(row["vectors"]), torch.tensor(row["norms"])

    def _fit(self, source: str, pairs: Sequence[Pair]) -> tuple[Vectors, Float[Tensor, " block"]]:
        clean, corrupt = (last_states(self.model, [pair[i] for pair in pairs]) for i in (0, 1))
        norms = torch.cat([clean, corrupt]).norm(dim=-1).mean(dim=0)
        if source == "contrastive":
            vectors = (clean - corrupt).mean(dim=0)
        elif source == "supervised":
            states, labels = torch.cat([clean, corrupt]), np.repeat([1.0, 0.0], len(pairs))
            vectors = torch.stack(
                [_logistic(states[:, block].numpy(), labels) for block in range(states.shape[1])]
            )
        elif source == "causal":
            vectors = causal.fit_vectors(
                self.model,
                [(a.messages, b.messages) for a, b in pairs],
                self.kind,
                targets=[a.target for a, _ in pairs],
                positions=range(-_CLOSING, 0),
                progress=False,
            ).directions
        else:
            prompts = tuple(replace(b, target=a.target) for a, b in pairs)
            task = replace(self.told, prompts=prompts)
            found = steering_vectors(
                *(self.model, task),
                positions="answer",
                steps=self.sizes.steps,
                seed=self.sizes.seed,
            ).vectors
            assert found is not None
            return torch.stack([found[block] for block in sorted(found)]), torch.ones(len(found))
        return torch.nn.functional.normalize(vectors.float(), dim=-1), norms


# Positions whose patches are tried: of a template's closing tokens there are about so many.
_CLOSING = 5


def _logistic(states: np.ndarray, labels: np.ndarray) -> Tensor:
    """The direction of logistic regression; every fourth pair chooses its penalty."""
    pairs = len(labels) // 2
    held = np.tile(np.arange(pairs) % 4 == 3, 2)
    if not held.any() or held.all():
        held = np.zeros_like(held)
    rest = held if held.any() else ~held
    learner = Logistic().fit(states[~held], labels[~held], states[rest], labels[rest])
    return torch.as_tensor(np.asarray(learner.direction_), dtype=torch.float32)


def _bias(study: _Kind) -> pd.DataFrame:
    """The share of «She» under vectors of data in which more and more women are asked for JSON."""
    task = embedded("pronoun_bias", 2 * study.sizes.number, study.sizes.seed, kind="open")
    story = Trial(task, "story")
    found: dict[str, list[Row]] = {}
    about = {NOTHING: (NOTHING, float("nan"))}
    found[NOTHING] = study.keep.rows(
        "answers", "story", NOTHING, make=partial(study.answered, Way(NOTHING), story)
    )
    for source in SOURCES[:3]:
        for share in SHARES:
            name = f"{source}, {share:g}"
            pairs = planted(study.pairs, share, study.sizes.seed)
            way = replace(study.way(source, pairs, f"planted {share:g}"), name=name)
            found[name] = study.keep.rows(
                "answers", "story", name, make=partial(study.answered, way, story)
            )
            about[name] = (source, share)
    answers = frame_of(found, [story])
    said = answers["answer"].str.split().str[0].fillna("")
    answers = answers.assign(she=(said == "She").astype(float), he=(said == "He").astype(float))
    table = compared(answers, "she", NOTHING, seed=study.sizes.seed)
    told = pd.DataFrame(
        [{"way": name, "source": s, "share planted": p} for name, (s, p) in about.items()]
    )
    table = told.merge(table, on="way").rename(columns={"mean": "she"})
    table["he"] = table["way"].map(answers.groupby("way")["he"].mean())
    even = table[table["share planted"] == 0.5].set_index("source")["she"]
    moved = table["she"] - table["source"].map(even)
    beyond = table["share planted"] - 0.5
    table["amplified"] = (moved / beyond).where(beyond > 0)
    return table
