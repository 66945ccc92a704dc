"""Policies of attention steering: what is added to the attention scores before the softmax.

A policy is a callable that takes a ``View`` and returns a bias that broadcasts to
``[row, head, query, key]``. Where it is added (heads, queries, keys that are not hidden) is
``attend``'s affair. A policy of one's own:

>>> def twice(view):
...     return 0.693 * view.span
>>> span = lk.span(model, "Answer in one word. What is rain?", "Answer in one word.")
>>> with lk.attend(model, span, twice):
...     answer = lk.generate(model, "Answer in one word. What is rain?", max_new_tokens=4)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed
from lenskit.attention.view import View

Policy = Callable[[View], Float[Tensor, "row head query key"]]


@dataclass(frozen=True)
class LogitBias(Displayed):
    """Add a constant to the scores of the span; the weights are multiplied by ``exp(strength)``.

    One ``strength``, or one for each token of the span; negative ones turn attention away. Cost: a
    mask. A large one empties everything else, the question among it.

    >>> lk.LogitBias(2.0)
    LogitBias(strength=2.0)
    """

    strength: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if isinstance(self.strength, Sequence):
            object.__setattr__(self, "strength", tuple(map(float, self.strength)))
        each = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        if not each or not all(map(math.isfinite, each)):
            raise ValueError(
                f"strength must be a finite number, or one for each token; got {self.strength!r} "
                "(Knockout() takes a span away altogether)"
            )

    def __call__(self, view: View) -> Tensor:
        if not isinstance(self.strength, tuple):
            return self.strength * view.span
        longest = int(view.place.max()) + 1
        if longest > len(self.strength):
            raise ValueError(
                f"strength has {len(self.strength)} numbers for a span of {longest} tokens"
            )
        strengths = torch.tensor(self.strength, device=view.place.device)
        return torch.where(view.span, strengths[view.place.clamp(min=0)], 0.0)


@dataclass(frozen=True, repr=False, eq=False)
class HeadBias(Displayed):
    """A bias of its own for every head: ``inside[block, head]`` is added to the span's scores.

    ``outside``, where it is given, is added to those of the prompt's other keys but the first
    token, on which many heads rest. Positive numbers turn a head to the span, and 0 leaves it as it
    was, so that no heads need be named. ``lk.emphasis.learn_head_bias`` finds them on prompts of
    one's own. Cost: a mask for each block. Raises ValueError for numbers that are not finite, or
    not ``[block, head]``; IndexError where the model has more blocks.

    >>> import torch
    >>> lk.HeadBias(torch.zeros(model.cfg.n_layers, model.cfg.n_heads))
    HeadBias
      inside   block 8 × head 8
      outside  None
    """

    inside: Float[Tensor, "block head"]
    outside: Float[Tensor, "block head"] | None = None

    def __post_init__(self) -> None:
        for name, given in (("inside", self.inside), ("outside", self.outside)):
            if given is None:
                continue
            if given.shape != self.inside.shape or given.ndim != 2:
                raise ValueError(f"{name} must be [block, head], got shape {list(given.shape)}")
            if not bool(given.isfinite().all()):
                raise ValueError(f"{name} must hold finite numbers")

    def __call__(self, view: View) -> Tensor:
        def of_heads(given: Tensor) -> Tensor:
            return given[view.block].to(view.span.device)[None, :, None, None]

        bias = of_heads(self.inside) * view.span
        if self.outside is None:
            return bias
        others = view.prompt & ~view.span & ~view.first
        return bias + of_heads(self.outside) * others


@dataclass(frozen=True)
class Knockout(Displayed):
    """No attention to the span at all (``-inf``): the edges from the queries to it are cut.

    Blocks are chosen by ``heads``, edges by ``queries``. Cost: a mask. A query that has no other
    key left is an error (arXiv 2304.14767).

    >>> lk.Knockout()
    Knockout()
    """

    def __call__(self, view: View) -> Tensor:
        return torch.zeros_like(view.span, dtype=torch.float32).masked_fill(view.span, -torch.inf)


@dataclass(frozen=True)
class Pasta(Displayed):
    """PASTA (arXiv 2311.02262): ``+ log α`` on the keys of the prompt outside the span.

    Equal to scaling these weights by α and normalising again. Several spans act as their union;
    generated tokens keep their weight; a learned sink counts as a key outside the prompt. ``mode``
    «include», as published, is exclude with 1/α, so that α below 1 steers *away* from the span.
    Cost: a mask. It needs ``heads``: on all of them it hurts, and with α near 0 the text
    degenerates. Of the first token it takes the sink's weight too, unless ``protect_bos``.

    >>> lk.Pasta(alpha=0.01)
    Pasta(alpha=0.01, mode='exclude')
    """

    alpha: float = 0.01
    mode: Literal["exclude", "include"] = "exclude"
    names_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("exclude", "include"):
            raise ValueError(f"mode must be 'exclude' or 'include', got {self.mode!r}")
        if not 0 <= self.alpha < math.inf or (self.alpha == 0 and self.mode == "include"):
            raise ValueError(f"alpha must be positive (0 cuts what is outside), got {self.alpha}")

    def __call__(self, view: View) -> Tensor:
        factor = math.log(self.alpha) if self.alpha else -math.inf
        outside = view.prompt & ~view.span
        bias = torch.zeros_like(outside, dtype=torch.float32)
        return bias.masked_fill(outside, factor if self.mode == "exclude" else -factor)


@dataclass(frozen=True)
class InstABoost(Displayed):
    """InstABoost (arXiv 2506.13734): the span's weights times ``multiplier``, normalised again.

    That is ``+ log M`` on the span. Cost: a mask. Published with M from 1 to 19 chosen by
    validation; too large a one suppresses the task. As published its span begins at the first
    token, so that the sink is boosted too: give such a span to have that.

    >>> lk.InstABoost(4)
    InstABoost(multiplier=4)
    """

    multiplier: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.multiplier < math.inf:
            raise ValueError(f"multiplier must be positive and finite, got {self.multiplier}")

    def __call__(self, view: View) -> Tensor:
        return math.log(self.multiplier) * view.span


@dataclass(frozen=True)
class Spotlight(Displayed):
    """Spotlight (arXiv 2505.12025): at least ``target`` of each query's attention on the span.

    Where the mass ψ of a query and head is between 0 and the target ψ*, the bias on the span is
    ``logit ψ* - logit ψ``, which reaches it exactly; elsewhere 0. ``published=True`` is the form of
    the paper: one ψ, the mean over heads and queries, and ``log(ψ*/ψ)``, which falls short
    (from .10 to .25 for a target of .30). Cost: the scores. A high target leaves the rest of the
    prompt unread.

    >>> lk.Spotlight(0.3)
    Spotlight(target=0.3, published=False)
    """

    target: float = 0.2
    published: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")

    def __call__(self, view: View) -> Tensor:
        mass = view.mass.double()
        if self.published:
            seen = mass > 0
            pooled = (mass * seen).sum((1, 2), keepdim=True) / seen.sum((1, 2), keepdim=True)
            raised = (pooled > 0) & (pooled < self.target)
            bias = torch.where(raised, (self.target / pooled).log(), 0.0)
        else:
            raised = (mass > 0) & (mass < self.target)
            bias = torch.where(raised, math.log(self.target / (1 - self.target)) - mass.logit(), 0)
        return bias.float() * view.span


@dataclass(frozen=True)
class Temperature(Displayed):
    """Divide the scores by a temperature: below 1 attention is sharper, above 1 more even.

    The span only says which prompts are meant; all keys are concerned. Cost: the scores.

    >>> lk.Temperature(0.5)
    Temperature(temperature=0.5)
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def __call__(self, view: View) -> Tensor:
        scores = view.scores
        return torch.where(scores.isfinite(), scores * (1 / self.temperature - 1), 0.0)
