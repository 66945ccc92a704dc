"""How steering fails: the signatures of deliberate faults, and whether they are named rightly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lenskit.concepts import Concept
from lenskit.selector import TokenSelection, pool_heads
from lenskit.study.cells import Row
from lenskit.study.diagnosis import diagnose
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.block_scores import BLOCK_SCORES, InBlocks, Top
from lenskit.study.experiments.cells import Measure, calibrated
from lenskit.study.experiments.classes import reasons
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.ways import Fitted, OfAnother, Way, controls
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors, fit_vectors

_OWN = Variant()
_TOO_MUCH, _TOO_LITTLE = 6.0, 0.1
_SIGNATURE = ("unchanged", "repeated", "divergence")


@dataclass(frozen=True)
class LeastAttentive:
    """Vectors read at the candidate token of each block that attends least to the prefix."""

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        captured = bench.capture
        attention = pool_heads(captured.attention_to_prefix[captured.prompts.has_prefix], "mean")
        index = attention.amax(dim=0).argmin(dim=-1)
        tokens = TokenSelection(index, captured.candidates, "argmin of attention to the prefix")
        return fit_vectors(captured, tokens, seed=bench.seed, progress=False)


@dataclass(frozen=True)
class Diagnosed:
    """What ``diagnose`` says of each fault, at the coefficient that it would be steered with."""

    ways: tuple[Way, ...]
    expected: Mapping[str, str]

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        rows: list[Row] = []
        for way, vectors, coefficient in calibrated(bench, self.ways, setting):
            if vectors is None:
                continue
            found = diagnose(
                bench.model,
                vectors,
                way.factor * coefficient,
                judge=setting.judge,
                concept=bench.concept,
                relative=True,
                statements=setting.statements,
                max_new_tokens=setting.max_new_tokens,
                seed=setting.seed,
            )
            at = {name: None for name in _SIGNATURE}
            if len(found.table):
                same = found.table[found.table["coefficient"] == way.factor * coefficient]
                at |= same[list(_SIGNATURE)].iloc[0].to_dict() if len(same) else {}
            rows.append(
                {"way": way.name, "expected": self.expected[way.name], "cause": found.cause}
                | {"named rightly": float(found.cause == self.expected[way.name])}
                | at
            )
        return rows


def failures(model: Model, concepts: Iterable[Concept] | Concept, **options: Any) -> Experiment:
    """The recipe beside faults: wrong token, block, sign or vector, too much, too little.

    Each fault is steered at the budget as any way is ("too much" at six times each coefficient,
    "too little" at a tenth) and handed to ``lk.diagnose`` at the calibrated coefficient times that
    factor. Measures beside the scores: the share of concepts "named rightly", and the signature
    there: answers that were "unchanged" or "repeated" themselves, and the "divergence" in nats a
    token. ``parts``: "causes", the share of each cause that was named; "reasons", those of the
    judge.

    ``options`` as in ``tokens``.
    """
    with begun("failures", model, concepts, options) as run:
        least = Top(BLOCK_SCORES["enrichment"], 1, lowest=True)
        last = replace(_OWN, blocks=str(run.shape.blocks - 1))
        faults = [
            (Way("as it should be", Fitted(_OWN)), "works"),
            (Way("wrong token: the least attentive", LeastAttentive()), "wrong token"),
            (Way("wrong block: the least enriched", InBlocks(_OWN, least)), "wrong block"),
            (Way("wrong block: the last", Fitted(last)), "wrong block"),
            (Way("wrong sign", Fitted(_OWN), factor=-1.0), "wrong sign"),
            (Way("too much", Fitted(_OWN), factor=_TOO_MUCH), "too much"),
            (Way("too little", Fitted(_OWN), factor=_TOO_LITTLE), "too little"),
        ]
        if run.several:
            faults.append((Way("another concept's", OfAnother(Fitted(_OWN))), "wrong token"))
        ways = tuple(way for way, _ in faults)
        measure = Measure("diagnosed", Diagnosed(ways, {w.name: c for w, c in faults}))
        everything = [*ways, *controls(_OWN, several=False)]
        run.prepare(*everything, measure)
        answers, named = run.answers(everything), run.measured(measure)
        keep = ["concept_class", "concept", "way", "named rightly", *_SIGNATURE]
        return run.scored(
            answers,
            "What do failures look like, and are they named rightly?",
            more=named[keep].astype(dict.fromkeys(_SIGNATURE, float)),
            parts={"causes": _causes(named), "reasons": reasons(answers)},
            notes=[
                "A fault need not be one: where a block thought wrong steers as well as others, "
                "«works» is the right name, and «named rightly» says otherwise."
            ],
        )


def _causes(named: pd.DataFrame) -> pd.DataFrame:
    """The share of concepts of each fault that each cause was named for."""
    shares = named.groupby(["way", "expected"], sort=False)["cause"].value_counts(normalize=True)
    return shares.rename("share").reset_index()
