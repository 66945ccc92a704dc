"""Which candidate token to read in which block (AGS, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._display import Displayed, by_block, quoted
from lenskit.capture import Capture


@dataclass(frozen=True, repr=False)
class TokenSelection(Displayed):
    """A candidate token for each block.

    ``index``: place among ``candidates``, 0 to K-1 in text order (K-1 is token -1). ``rule``
    says in words how it was chosen.
    """

    index: Int[Tensor, " layer"]
    candidates: tuple[str, ...]
    rule: str

    def __post_init__(self) -> None:
        places = len(self.candidates)
        if self.index.dtype == torch.bool or self.index.is_floating_point():
            raise ValueError(f"index must hold whole numbers, got {self.index.dtype}")
        if self.index.ndim != 1 or bool(((self.index < 0) | (self.index >= places)).any()):
            raise ValueError(
                f"index must be one place from 0 to {places - 1} for each block, got {self.index}"
            )

    def _headline(self) -> str:
        return f"TokenSelection for {len(self.index)} blocks"

    def _rows(self) -> dict[str, object]:
        return {
            "rule": self.rule,
            "candidates": quoted(self.candidates),
            "tokens": by_block(self.tokens),
            "offsets": by_block(self.offsets.tolist()),
        }

    @property
    def offsets(self) -> Int[Tensor, " layer"]:
        """The selected tokens counted from the end of the prompt: -K to -1."""
        return self.index - len(self.candidates)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The selected token of each block, as text."""
        return tuple(self.candidates[place] for place in self.index.tolist())

    def check(self, candidates: tuple[str, ...], layers: int) -> None:
        """Raise ValueError unless this selects among these candidates, in so many blocks."""
        if self.candidates != candidates or len(self.index) != layers:
            raise ValueError(
                f"tokens selects among {self.candidates} for {len(self.index)} blocks, but the "
                f"candidates are {candidates} and there are {layers} blocks; select tokens anew"
            )

    def take(
        self, values: Float[Tensor, "prompt layer candidate *rest"]
    ) -> Float[Tensor, "prompt layer *rest"]:
        """The entries of ``values`` at each block's selected token."""
        layers, places = len(self.index), len(self.candidates)
        if values.shape[1:3] != (layers, places):
            raise ValueError(
                f"values must be [prompt, layer={layers}, candidate={places}, …], "
                f"got {tuple(values.shape)}"
            )
        return values[:, torch.arange(layers), self.index]


def select_tokens(
    capture: Capture,
    *,
    heads: Literal["mean", "max"] = "mean",
    prompts: Literal["max", "mean"] = "max",
) -> TokenSelection:
    """The candidate token that attends most to the prefix, for each block (AGS, Eq. 3).

    ``t_l = argmax_t max_p a[p,l,t]``, where ``a`` is the attention mass on the prefix, averaged
    over heads, of prompt ``p``; ``heads`` and ``prompts`` replace that mean and that maximum.
    Of equal candidates the later token is taken. Only prompts with a prefix count.

    Raises ``ValueError`` when none has one.

    >>> tokens = lk.select_tokens(capture)
    >>> tokens.tokens[0] in prompts.candidates
    True
    """
    prefixed = capture.prompts.has_prefix
    if not bool(prefixed.any()):
        raise ValueError("the capture has no prompt with a prefix to select tokens by")
    attention = pool_heads(capture.attention_to_prefix[prefixed], heads)
    pooled = _pool(attention, prompts, 0, "prompts")
    best = pooled == pooled.max(dim=-1, keepdim=True).values
    places = torch.arange(pooled.shape[-1])
    chosen = torch.where(best, places, -1).max(dim=-1).values
    rule = f"argmax of attention to the prefix ({heads} over heads, {prompts} over prompts)"
    return TokenSelection(chosen, capture.candidates, rule)


def fixed_token(capture: Capture, offset: int = -1) -> TokenSelection:
    """The same candidate token for all blocks, counted from the end (the baselines of AGS).

    Raises ``ValueError`` unless ``offset`` is a whole number from -K to -1.

    >>> lk.fixed_token(capture, -1).offsets.unique()
    tensor([-1])
    """
    places = len(capture.candidates)
    try:
        offset = index(offset)
    except TypeError:
        raise ValueError(f"offset must be a whole number such as -1, got {offset!r}") from None
    if not -places <= offset <= -1:
        raise ValueError(
            f"offset must be from {-places} to -1 (the candidates are "
            f"{', '.join(map(repr, capture.candidates))}), got {offset}"
        )
    chosen = torch.full((capture.layers,), places + offset, dtype=torch.long)
    return TokenSelection(chosen, capture.candidates, f"token {offset}")


def find_tokens(
    capture: Capture, tokens: TokenSelection | Callable[[Capture], TokenSelection] | str | int
) -> TokenSelection:
    """A selection from itself, a function of the capture, "attention", or an offset such as "-1".

    Raises ``ValueError`` for a selection among other candidates, or for other blocks, than those
    of the capture.
    """
    if isinstance(tokens, str):
        if tokens == "attention":
            return select_tokens(capture)
        if not tokens.removeprefix("-").isdecimal():
            raise ValueError(f"tokens must be 'attention' or an offset such as -1, got {tokens!r}")
        tokens = int(tokens)
    found: object = tokens(capture) if callable(tokens) else tokens
    if isinstance(found, Real):
        return fixed_token(capture, found)  # type: ignore[arg-type]
    if not isinstance(found, TokenSelection):
        raise TypeError(
            "tokens must be a TokenSelection, a function that makes one of a capture, 'attention', "
            f"or an offset such as -1; got {type(found).__name__}"
        )
    found.check(capture.candidates, capture.layers)
    return found


def pool_heads(
    attention: Float[Tensor, "prompt layer head candidate"], how: Literal["mean", "max"]
) -> Float[Tensor, "prompt layer candidate"]:
    """Attention to the prefix, averaged over heads or of the head that attends most.

    Raises ValueError for attention that is not finite, which would be the largest.
    """
    if not bool(attention.isfinite().all()):
        raise ValueError("attention to the prefix is not finite; capture it anew")
    return _pool(attention, how, 2, "heads")


def _pool(values: Tensor, how: str, axis: int, name: str) -> Tensor:
    if how == "mean":
        return values.mean(dim=axis)
    if how == "max":
        return values.amax(dim=axis)
    raise ValueError(f"{name} must be 'mean' or 'max', got {how!r}")
