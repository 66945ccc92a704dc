"""Policies that edit keys before the scores are made: SEKA and AdaSEKA.

What ``attend`` takes of this kind is any object with the two methods of ``KeyPolicy``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.attention.projections import KeyProjections
from lenskit.attention.reading import read_heads, without_edits
from lenskit.attention.span import Span
from lenskit.models import (
    ModelCheckError,
    head_hooks,
    in_batches,
    pad_left,
    require_positions,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@runtime_checkable
class KeyPolicy(Protocol):
    """Adds ``Σ_m w_m M_m k`` to the keys ``k`` of a span, before the rotation."""

    def maps(self, model: TransformerBridge) -> Float[Tensor, "part layer kv_head d_head d_head"]:
        """The matrices ``M_m``, the same for all prompts."""

    def weights(
        self, model: TransformerBridge, spans: Sequence[Span]
    ) -> Float[Tensor, "span part layer kv_head"]:
        """The weights ``w_m`` for each of some spans."""


@dataclass(frozen=True, repr=False)
class Seka(Displayed):
    """SEKA (arXiv 2603.01281): the keys of the span become ``k + (g⁺ P⁺ k + g⁻ P⁻ k) / 2``.

    ``gain`` is ``g⁺``, ``negative_gain`` is ``g⁻``; ``projections`` come from
    ``fit_key_projections``, on this model. Keys are taken behind their norm and before the
    rotation, so that the edit is the same at every position. The score of query ``q`` changes by
    ``qᵀR(g⁺ P⁺ k + g⁻ P⁻ k) / 2`` times the scale, with R the rotation between the two: where that
    is negative, attention to the span falls.

    Keys are edited in the pass that makes them, so that all queries see the edit: ``queries``,
    ``start`` and ``schedule`` of ``attend`` have no place. Edited keys stay in the cache, also
    behind the context, and a cache that was filled before it is refused. Score policies see the
    scores of edited keys, whichever context is the outer one. With ``protect_bos`` the first token
    is left out of the span.

    ``heads`` must be named (``projections.heads``): published with those of large shift; with all
    of them, or with random projections (``projections.random``), answers get worse. A head's keys
    are those of its key-value head: where heads share one, those of its group that are not named
    see the edit too.

    Cost: a product of ``d_head × d_head`` for each key of the span, once a prompt. Fused attention
    stays where keys have a projection of their own; where it is joint with queries and values
    (GPT-2, NeoX, Phi-3, Bloom), generation runs eager attention. Published gains are chosen by
    validation; too large ones make keys that no query is used to.

    >>> examples = [lk.key_contrast(model, "Rain falls.", "Rain", "What falls?", "Who is late?")]
    >>> projections = lk.fit_key_projections(model, examples, progress=False)
    >>> question = "Answer in one word. What is rain?"
    >>> span = lk.span(model, question, "Answer in one word.")
    >>> with lk.attend(model, span, lk.Seka(projections, gain=0.5), heads=projections.heads(8)):
    ...     answer = lk.generate(model, question, max_new_tokens=4)
    """

    projections: KeyProjections
    gain: float = 1.0
    negative_gain: float = 0.0
    names_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_projections("projections", self.projections)
        _require_finite("gain", self.gain)
        _require_finite("negative_gain", self.negative_gain)
        learnt = bool((self.projections.irrelevant_mass > 0).any())
        if self.negative_gain and not learnt:
            raise ValueError(
                f"negative_gain={self.negative_gain} has nothing to act on: the projections were "
                "fitted without irrelevant questions"
            )

    def maps(self, model: TransformerBridge) -> Float[Tensor, "part layer kv_head d_head d_head"]:
        self.projections.check_model(model)
        own = self.gain * self.projections.positive.double()
        if self.negative_gain:
            own = own + self.negative_gain * self.projections.negative.double()
        return (own / 2)[None].float()

    def weights(
        self, model: TransformerBridge, spans: Sequence[Span]
    ) -> Float[Tensor, "span part layer kv_head"]:
        return torch.ones(len(spans), 1, *self.projections.shift.shape)


@dataclass(frozen=True, repr=False, eq=False)
class AdaSeka(Displayed):
    """AdaSEKA (arXiv 2603.01281): a mixture of experts' projections, chosen by the prompt's query.

    The keys of the span become ``k + g Σ_m α_m U_m U_mᵀ k``, with ``U_m`` the first ``components``
    columns of expert m's ``U⁺``, ``s`` their singular values, and ``q`` the query of the prompt's
    last token, the mean of the heads that share the keys, as it is before the rotation and without
    any edit: ``α_m = Σ_i s_mi qᵀu_mi / max_n |Σ_i s_ni qᵀu_ni|``, from -1 to 1. An expert with a
    negative weight has its part of the keys weakened.

    ``experts``: projections by name, each fitted on the examples of one task. Everything else as
    for ``Seka``, with one forward pass more for each prompt when ``attend`` is entered.

    The published code reads the query from what the block has written instead of what it is given;
    here it is the head's own. Where no expert is for the prompt, one still has weight 1 or -1.

    >>> examples = [lk.key_contrast(model, "Rain falls.", "Rain", "What falls?")]
    >>> expert = lk.fit_key_projections(model, examples, progress=False)
    >>> question = "What is rain?"
    >>> span, both = lk.span(model, question, "rain"), {"one": expert, "other": expert.random(0)}
    >>> with lk.attend(model, span, lk.AdaSeka(both), heads=expert.heads(8)):
    ...     answer = lk.generate(model, question, max_new_tokens=4)
    """

    experts: Mapping[str, KeyProjections]
    gain: float = 1.0
    components: int = 3
    names_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.experts, Mapping) or not self.experts:
            raise ValueError("experts must be {name: KeyProjections}, at least one")
        for name, expert in self.experts.items():
            _require_projections(f"experts[{name!r}]", expert)
        _require_finite("gain", self.gain)
        least = min(each.relevant.shape[-1] for each in self.experts.values())
        whole("components", self.components, 1, least)

    def maps(self, model: TransformerBridge) -> Float[Tensor, "part layer kv_head d_head d_head"]:
        first = [self._first(model, expert)[0] for expert in self.experts.values()]
        return torch.stack([self.gain * (each @ each.mT) for each in first])

    def weights(
        self, model: TransformerBridge, spans: Sequence[Span]
    ) -> Float[Tensor, "span part layer kv_head"]:
        """``α`` of each expert, ``[span, expert, layer, kv_head]``; 0 where all sums are 0."""
        queries = _last_queries(model, spans)
        sums = torch.stack(
            [
                torch.einsum("slhd,lhdc,lhc->slh", queries, *self._first(model, expert))
                for expert in self.experts.values()
            ],
            dim=1,
        )
        most = sums.abs().amax(dim=1, keepdim=True)
        return torch.where(most > 0, sums / most, 0.0)

    def _first(self, model: TransformerBridge, expert: KeyProjections) -> tuple[Tensor, Tensor]:
        expert.check_model(model)
        return (
            expert.relevant[..., : self.components],
            expert.relevant_mass[..., : self.components],
        )


def _last_queries(
    model: TransformerBridge, spans: Sequence[Span]
) -> Float[Tensor, "span layer kv_head d_head"]:
    """The query of each prompt's last token, the mean over the heads that share keys."""
    hooks = head_hooks(model)
    if not hooks.queries:
        raise ModelCheckError(
            "the queries of this model's heads cannot be read before the rotation, as AdaSeka needs"
        )
    tokens = pad_left([each.ids for each in spans], model.tokenizer.pad_token_id)
    require_positions(model, tokens)
    found = torch.zeros(len(spans), model.cfg.n_layers, hooks.kv_heads, hooks.d_head)

    def run(rows: Tensor) -> None:
        def receive(block: int, queries: Float[Tensor, "row pos head d_head"]) -> None:
            last = queries[:, -1].float().cpu()
            found[rows, block] = last.unflatten(1, (hooks.kv_heads, -1)).mean(dim=2)

        read_heads(model, hooks, hooks.queries, tokens.rows(rows).trimmed(), receive)

    with without_edits(model, hooks):
        in_batches(tokens, 64, run, progress=False, description="Reading queries")
    if not bool(found.isfinite().all()):
        raise ValueError("the prompts' queries are not finite; another dtype may help")
    return found


def _require_projections(name: str, given: object) -> None:
    if not isinstance(given, KeyProjections):
        raise TypeError(f"{name} must be KeyProjections (fit_key_projections); got {given!r}")


def _require_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
