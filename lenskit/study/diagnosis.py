"""Why does a vector not steer? What its failure looks like, the likely cause, and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import pandas as pd
import torch

from lenskit._arguments import block_numbers
from lenskit._display import Displayed, quoted
from lenskit.attention import Heads
from lenskit.capture import capture
from lenskit.concepts import Concept
from lenskit.prompts import build_prompts
from lenskit.scoring import Judge, likelihood_judge
from lenskit.study.divergence import neutral_questions, unsteered
from lenskit.study.probe import Probe
from lenskit.vectors import ConceptVectors, fit_vectors, in_blocks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Cause: TypeAlias = Literal[
    "works",
    "too little",
    "too much",
    "wrong sign",
    "wrong block",
    "wrong token",
    "weak prefix",
    "too strong",
    "wrong span",
    "irrelevant heads",
    "unknown",
]
# A vector that shows the concept in less than this share of what the prefix does is taken to fail.
WORKS = 0.3
# What the prefix must show for anything to be seen.
WEAKEST = 0.2
# A vector that shows less than this share may be in a wrong place, where another shows much more.
PARTLY, _MUCH_MORE = 0.7, 1.5
# A coefficient that is so many times off the range is cause enough.
_FAR = 3.0
# From this cosine on two fits of a direction are taken to be one.
_ALIKE = 0.9
_QUESTIONS, _BLOCKS = 4, 4
_TOKENS = ("attention", "each")

_SAID: Mapping[str, str] = {
    "works": "it brings the concept into the answers",
    "too little": "the direction is right, but it is added too weakly to show",
    "too much": "the direction is right, but it is added so strongly that the answers suffer",
    "wrong sign": "the vector steers the other way: turn its sign",
    "wrong block": "vectors fitted anew steer elsewhere, but not so in these blocks",
    "wrong token": "vectors fitted anew steer in these blocks, so these directions are not the "
    "concept's: read at the wrong token, or of something else",
    "weak prefix": "the prefix itself hardly shows the concept, by this judge, so that there is "
    "nothing its vector could do",
    "unknown": "neither this vector nor one fitted anew steers the concept in any block",
}
_SAID_OF_EDITS: Mapping[str, str] = {
    "works": "it makes the answers follow the span",
    "too little": "spans and heads are right, but the bias is too weak to show",
    "too strong": "spans and heads are right, but the bias is so strong that the answers suffer",
    "wrong span": "with the task's own spans the same edit helps",
    "irrelevant heads": "with other heads the same policy helps; these do not carry the span",
    "unknown": "neither this edit nor another strength, span or set of heads helps",
}


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis(Displayed):
    """The likely ``cause``, with the signatures that it was read from.

    ``coefficients``: from which to which to try, in the unit of those of ``steer``; ``None`` where
    none helps. ``blocks`` and ``token``: where and how vectors fitted anew do more, for which the
    coefficients are then meant. ``table``, for each coefficient tried: the share of answers that
    have ``shown`` the concept, that ``repeated`` themselves, that were ``unchanged``, and the
    ``divergence`` (nats a token on neutral questions). ``prompted``: the share that the prefix
    shows. ``reference``: the same of vectors fitted anew, by what they are.

    Of an edit of attention (``of="edit"``): ``shown`` is the task's score, a coefficient multiplies
    the policy's bias, ``prompted`` is the score without the edit, ``reference`` the best of other
    spans and heads, and ``heads`` those to try.
    """

    cause: Cause
    coefficients: tuple[float, float] | None
    table: pd.DataFrame
    prompted: float
    reference: Mapping[str, float] = field(default_factory=dict)
    token: str = ""
    blocks: tuple[int, ...] | None = None
    heads: Heads | None = None
    of: Literal["vectors", "edit"] = "vectors"

    def _headline(self) -> str:
        return f"Diagnosis: {self.cause}"

    def _rows(self) -> dict[str, object]:
        edit = self.of == "edit"
        because = (_SAID_OF_EDITS if edit else _SAID)[self.cause]
        shown: dict[str, object] = {"because": because}
        if self.heads is not None:
            shown["heads to try"] = self.heads
        if self.token:
            shown["token to try"] = self.token
        if self.blocks:
            shown["blocks to try"] = quoted(self.blocks)
        if self.coefficients:
            low, high = self.coefficients
            shown["coefficients to try"] = f"{low:.3g} to {high:.3g}"
        if len(self.table):
            best = self.table.loc[self.table["shown"].idxmax()]
            shown["score at best" if edit else "at best shown in"] = (
                f"{best['shown']:.0%}{'' if edit else ' of the answers'}, "
                f"at {best['coefficient']:.3g}"
            )
        if self.reference:
            name = max(self.reference, key=self.reference.__getitem__)
            label = "otherwise, at best" if edit else "fitted anew, at best"
            shown[label] = f"{self.reference[name]:.0%}, {name}"
        return shown | {f"{'without' if edit else 'with the prefix'}": f"{self.prompted:.0%}"}


def diagnose(
    model: TransformerBridge,
    vectors: ConceptVectors,
    coefficient: float | None = None,
    *,
    blocks: Iterable[int] | None = None,
    judge: Judge | None = None,
    concept: Concept | None = None,
    relative: bool | None = None,
    prompts: int = 40,
    statements: Sequence[str] | None = None,
    max_new_tokens: int = 30,
    seed: int = 0,
    batch_size: int = 64,
) -> Diagnosis:
    """The likely cause why vectors do not steer, and a range of coefficients to try.

    The concept's questions are answered at coefficients around the one that moves the model by half
    a nat a token, of both signs. Where the concept shows at some of them, the coefficient given is
    judged; where only at negative ones, the sign. Otherwise ``prompts`` are captured and vectors
    fitted anew, of the attention-guided token and of each closing token, in the same blocks, in all
    and in some alone: where these show the concept in the same blocks the directions were wrong
    (token), and where only in others, the blocks. Vectors that are much the same when they are
    fitted anew were right, so that the blocks come first where others help. So it is too where the
    coefficient given just fails and others show the concept in part: what does much more is the
    cause.

    ``coefficient`` and ``blocks``: those that were used; without the first only the direction is
    judged. ``judge``: by default ``likelihood_judge(model)``. ``concept``: by default that of the
    vectors; neutral questions are asked where it has none. Raises ValueError for vectors of another
    model, or that are zero in all blocks.

    >>> judge = lk.phrase_judge(["web", "spider"])
    >>> found = lk.diagnose(model, vectors, 0.05, judge=judge, prompts=8, max_new_tokens=4)
    >>> 0 <= found.prompted <= 1
    True
    """
    vectors.check_model(model)
    chosen = block_numbers("blocks", blocks, len(vectors))
    vectors = in_blocks(vectors, chosen)
    acting = vectors.directions.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if not acting:
        raise ValueError(f"vectors are zero in blocks {list(chosen)}, so they steer nothing")
    if coefficient is not None and not math.isfinite(coefficient):
        raise ValueError(f"coefficient must be finite, got {coefficient}")
    own = vectors.concept if concept is None else concept
    written = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    probe = Probe(
        model,
        own,
        own.questions or neutral_questions(_QUESTIONS),
        likelihood_judge(model) if judge is None else judge,
        unsteered(model, neutral_questions(_QUESTIONS), **written),
        relative,
        written,
    )
    prompted = probe.prompted()
    if prompted < WEAKEST:
        return Diagnosis("weak prefix", None, pd.DataFrame(), prompted)
    enough = WORKS * prompted
    (table,) = probe.curves([vectors], given=coefficient)
    positive, negative = table[table["coefficient"] > 0], table[table["coefficient"] < 0]
    most, least = positive["shown"].max(), negative["shown"].max()
    anew = partial(_anew, probe, vectors, acting, table, prompted, prompts, statements, seed)
    if most >= enough and most >= least:
        span = _range(positive)
        found = Diagnosis(_strength(coefficient, span), span, table, prompted)
        far = coefficient is not None and not span[0] / _FAR <= coefficient <= span[1] * _FAR
        if found.cause == "works" or most >= PARTLY * prompted or far:
            return found
        # Neither the coefficient given nor any other does much: is it the place?
        other = anew(_MUCH_MORE * most)
        return found if other.cause == "unknown" else other
    if least >= enough:
        low, high = _range(negative.assign(coefficient=-negative["coefficient"]))
        turned = coefficient is not None and coefficient < 0
        cause = _strength(-coefficient, (low, high)) if turned and coefficient else "wrong sign"
        return Diagnosis(cause, (-high, -low), table, prompted)
    return anew(enough)


def _anew(
    probe: Probe,
    vectors: ConceptVectors,
    acting: list[int],
    table: pd.DataFrame,
    prompted: float,
    prompts: int,
    statements: Sequence[str] | None,
    seed: int,
    enough: float,
) -> Diagnosis:
    """What vectors fitted anew tell of the token and the blocks: who shows ``enough`` helps."""
    number = prompts if statements is None else min(prompts, len(statements) // 2 * 2)
    made = capture(
        probe.model,
        build_prompts(probe.model, probe.concept, number=number, statements=statements, seed=seed),
        progress=False,
    )
    every = len(vectors)
    some = sorted({round(i * (every - 1) / max(1, _BLOCKS - 1)) for i in range(_BLOCKS)})
    placed = {"the same blocks": acting, "all blocks": list(range(every))}
    placed |= {f"block {block}": [block] for block in some}
    tried = [(token, name) for token in _TOKENS for name in placed]
    fitted = {token: fit_vectors(made, token, seed=seed, progress=False) for token in _TOKENS}
    curves = probe.curves(
        [in_blocks(fitted[token], placed[name]) for token, name in tried], both=False
    )
    shown = [float(each["shown"].max()) for each in curves]
    reference = {
        f"token {token}, {name}": share for (token, name), share in zip(tried, shown, strict=True)
    }
    places = dict[Cause, list[int]]({"wrong token": [], "wrong block": []})
    for i, (_, name) in enumerate(tried):
        places["wrong token" if placed[name] == acting else "wrong block"].append(i)
    own_token = fitted["each" if vectors.closing else "attention"]
    order: list[Cause] = ["wrong token", "wrong block"]
    if _alike(vectors, own_token, acting):
        order.reverse()
    bests = {cause: max(places[cause], key=shown.__getitem__) for cause in order if places[cause]}
    helping = [cause for cause in bests if shown[bests[cause]] >= enough]
    if not helping:
        return Diagnosis("unknown", None, table, prompted, reference)
    cause, best = helping[0], bests[helping[0]]
    token, name = tried[best]
    where = tuple(placed[name])
    return Diagnosis(cause, _range(curves[best]), table, prompted, reference, token, where)


def _alike(one: ConceptVectors, other: ConceptVectors, blocks: Sequence[int]) -> bool:
    """Whether the directions in these blocks are much the same, on average."""
    first, second = (each.directions[list(blocks)].flatten(1).float() for each in (one, other))
    if first.shape != second.shape:
        return False
    return float(torch.cosine_similarity(first, second).mean()) >= _ALIKE


def _range(table: pd.DataFrame) -> tuple[float, float]:
    """The coefficients around the best one that show the concept at least half as often."""
    own = table.sort_values("coefficient", ignore_index=True)
    best = int(own["shown"].idxmax())
    enough = (own["shown"] >= own["shown"].max() / 2).tolist()
    low = high = best
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < len(own) - 1 and enough[high + 1]:
        high += 1
    return float(own.loc[low, "coefficient"]), float(own.loc[high, "coefficient"])


def _strength(coefficient: float | None, span: tuple[float, float]) -> Cause:
    if coefficient is None:
        return "works"
    if coefficient < 0:
        return "wrong sign"
    low, high = span
    return "too little" if coefficient < low else "too much" if coefficient > high else "works"
