"""Key projections from contrastive prompts: a text with a question that a span of it answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.attention.projections import KeyProjections, share
from lenskit.attention.reading import read_heads, without_edits
from lenskit.attention.span import Span, span
from lenskit.models import (
    head_hooks,
    in_batches,
    model_fingerprint,
    pad_left,
    require_positions,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class KeyContrast(Displayed):
    """The same tokens in three prompts: without a question, with one they answer, with another.

    ``irrelevant`` may be left out (of all examples). ``key_contrast`` makes one of texts;
    ``lk.span`` finds the spans of prompts of another form. Raises ValueError where the spans do not
    hold the same tokens.
    """

    neutral: Span
    relevant: Span
    irrelevant: Span | None = None

    def __post_init__(self) -> None:
        held = [[each.ids[at] for at in each.positions] for each in self.spans]
        for own, each in zip(held, self.spans, strict=True):
            if own != held[0]:
                raise ValueError(
                    f"the spans {self.neutral.text!r} and {each.text!r} are of different tokens, "
                    f"{held[0]} and {own}; a key is compared with that of the same token"
                )

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that there are, the neutral one first."""
        given = (self.neutral, self.relevant, self.irrelevant)
        return tuple(each for each in given if each is not None)


def key_contrast(
    model: TransformerBridge,
    context: str,
    answer: str,
    relevant: str,
    irrelevant: str | None = None,
    *,
    nth: int | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> KeyContrast:
    """The prompts of one example: the context alone, and behind the question, as SEKA has them.

    ``answer``: the part of the context whose keys are read (``nth``: which, where it occurs
    several times). ``relevant``: a question that it answers; ``irrelevant``: one that it does not.
    A question stands before the context, so that the context's tokens see it.

    Raises ValueError as ``lk.span`` does.

    >>> text, asked = "Rain falls on the hills.", "Where does rain fall?"
    >>> lk.key_contrast(model, text, "on the hills", asked, "Who is late?").neutral.text
    'on the hills'
    """
    start = _place(context, answer, nth)
    prompts = [f"Context: {context}"]
    for question in (relevant, irrelevant):
        if question is not None:
            prompts.append(f"Question: {question}\nContext: {context}")
    spans = []
    for prompt in prompts:
        before = len(prompt) - len(context) + start
        characters = (before, before + len(answer))
        spans.append(
            span(model, prompt, characters=characters, template_arguments=template_arguments)
        )
    return KeyContrast(*spans)


def _place(context: str, answer: str, nth: int | None) -> int:
    """Where the answer begins in the context, the only place or the one that is meant."""
    found = [match.start() for match in re.finditer(re.escape(answer), context)] if answer else []
    if not found:
        raise ValueError(f"answer={answer!r} is not in the context {context[:120]!r}")
    if nth is None and len(found) > 1:
        raise ValueError(f"answer={answer!r} occurs {len(found)} times; say which with nth")
    place = 0 if nth is None else nth
    if not -len(found) <= place < len(found):
        raise ValueError(f"nth={nth}, but answer={answer!r} occurs {len(found)} times (from 0)")
    return found[place]


def fit_key_projections(
    model: TransformerBridge,
    examples: Sequence[KeyContrast],
    *,
    mass: float = 0.9,
    batch_size: int = 32,
    progress: bool = True,
) -> KeyProjections:
    """The subspaces of each key-value head that relevance strengthens, as SEKA learns them.

    With ``K``, ``K⁺`` and ``K⁻`` the keys of the examples' n span tokens without a question, with
    one that they answer and with another (each behind its projection and norm, before the
    rotation): ``Ω⁺ = KᵀK⁺/n = U⁺S⁺V⁺ᵀ``, ``Ω⁻ = KᵀK⁻/n = U⁻S⁻V⁻ᵀ``. ``P⁺`` projects on the first
    columns of ``U⁺``, the fewest that hold the share ``mass`` of the sum of ``S⁺``; ``P⁻`` on what
    as many of ``U⁻`` as hold that share leave (arXiv 2603.01281, section 3). The shift of a head is
    the mean over tokens of ``|k⁺ - k⁻|`` (without ``K⁻``: of ``|k⁺ - k|``).

    On purpose otherwise than published: the shift is no norm of all tokens divided by n, no head is
    set to zero by it (``KeyProjections.heads`` chooses), and a singular vector has the sign with
    which the mean of ``K⁺`` projects positively on it (``AdaSeka`` depends on the sign).

    ``batch_size`` counts examples, each of two or three prompts. Edits applied to the model are
    left out. Cost: a forward pass without logits for each prompt, and two singular value
    decompositions of ``d_head × d_head`` for each head.

    With few examples ``P⁺`` is of their content more than of relevance: hundreds are published.
    Keys of the first block know nothing of a question, and move by nothing. Where positions are
    added to the embeddings (GPT-2, OPT), keys also move because a question stands before them.

    Raises ModelCheckError for a model whose keys cannot be edited, and ValueError for no examples,
    for some with and some without ``irrelevant``, and for keys that are not finite.

    >>> text, asked = "Rain falls on the hills.", "Where does rain fall?"
    >>> examples = [lk.key_contrast(model, text, "on the hills", asked, "Who is late?")]
    >>> lk.fit_key_projections(model, examples, progress=False).tokens == len(examples[0].neutral)
    True
    """
    from lenskit import __version__

    mass, batch_size = share("mass", mass), whole("batch_size", batch_size, 1)
    given = list(examples)
    kinds = {len(each.spans) for each in given}
    if len(kinds) != 1:
        raise ValueError(
            "examples must all have an irrelevant span, or none of them; some lack it"
            if kinds
            else "examples is empty; give at least one KeyContrast, as key_contrast makes it"
        )
    hooks = head_hooks(model)
    size = (model.cfg.n_layers, hooks.kv_heads, hooks.d_head)
    found = _Sums(
        torch.zeros(2, *size, hooks.d_head, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
        torch.zeros(size[:2], dtype=torch.float64),
    )
    padding = model.tokenizer.pad_token_id

    def run(rows: Tensor) -> None:
        own = [given[row].spans for row in rows.tolist()]
        spans = [each for kind in zip(*own, strict=True) for each in kind]
        tokens = pad_left([each.ids for each in spans], padding)
        require_positions(model, tokens)
        width, number = tokens.input_ids.shape[1], len(own)
        places = [
            (row, width - each.length + at)
            for row, each in enumerate(spans)
            for at in each.positions
        ]
        row, at = torch.tensor(places).T
        of_kind = [row // number == kind for kind in range(len(own[0]))]
        batch = found.zeros()

        def receive(block: int, keys: Float[Tensor, "row pos kv_head d_head"]) -> None:
            read = keys[row.to(keys.device), at.to(keys.device)].float().cpu().double()
            if not bool(read.isfinite().all()):
                raise ValueError(
                    f"keys of block {block} are not finite; load the model in another dtype "
                    "(dtype='float32' or 'bfloat16')"
                )
            batch.add(block, [read[own] for own in of_kind])

        read_heads(model, hooks, hooks.keys, tokens, receive)
        # Only a batch that has come to its end counts: one without memory is run again.
        found.join(batch)

    relevant = pad_left([each.relevant.ids for each in given], padding)
    with without_edits(model, hooks):
        in_batches(relevant, batch_size, run, progress=progress, description="Reading keys")
    number = sum(len(each.neutral) for each in given)
    vectors, values, _ = torch.linalg.svd(found.products / number)
    along = torch.einsum("lhd,olhdc->olhc", found.relevant, vectors)
    vectors = torch.where(along < 0, -1.0, 1.0)[..., None, :] * vectors
    vectors = torch.where(values.sum(dim=-1)[..., None, None] > 0, vectors, 0.0)
    return KeyProjections(
        relevant=vectors[0].float(),
        irrelevant=vectors[1].float(),
        relevant_mass=values[0].float(),
        irrelevant_mass=values[1].float(),
        shift=(found.shift / number).float(),
        mass=mass,
        group=hooks.heads // hooks.kv_heads,
        tokens=number,
        model=model_fingerprint(model),
        data_hash=_hash(given),
        version=__version__,
    )


@dataclass
class _Sums:
    """Sums over tokens: of ``k k⁺ᵀ`` and ``k k⁻ᵀ``, of ``k⁺``, and of how far keys move."""

    products: Float[Tensor, "2 layer kv_head d_head d_head"]
    relevant: Float[Tensor, "layer kv_head d_head"]
    shift: Float[Tensor, "layer kv_head"]

    def zeros(self) -> _Sums:
        return _Sums(*(torch.zeros_like(each) for each in vars(self).values()))

    def add(self, block: int, keys: Sequence[Float[Tensor, "token kv_head d_head"]]) -> None:
        """Neutral, relevant and, where there are any, irrelevant keys of the same tokens."""
        neutral, relevant, *others = keys
        for place, each in enumerate(keys[1:]):
            self.products[place, block] += torch.einsum("nhd,nhe->hde", neutral, each)
        self.relevant[block] += relevant.sum(dim=0)
        self.shift[block] += (relevant - [neutral, *others][-1]).norm(dim=-1).sum(dim=0)

    def join(self, other: _Sums) -> None:
        for name, each in vars(self).items():
            each += getattr(other, name)


def _hash(examples: Sequence[KeyContrast]) -> str:
    told: list[Any] = [[(s.ids, s.positions) for s in each.spans] for each in examples]
    return hashlib.sha256(repr(told).encode()).hexdigest()
