"""Activation steering: adding concept vectors to the residual stream (AGS, arXiv 2602.00333).

``H̃[l,t] = H[l,t] + ε v[l]`` at chosen blocks, in a plain forward pass as in cached generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit.models import hooked, position_ids, using
from lenskit.recipes import DEFAULT

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import ConceptVectors

    Coefficient: TypeAlias = float | Sequence[float] | Float[Tensor, "row"]
    Composition: TypeAlias = Sequence[tuple[ConceptVectors, Coefficient]]
    Steering: TypeAlias = ConceptVectors | Composition | Sequence[ConceptVectors | None]


@dataclass(frozen=True)
class Intervention:
    """What is added to the residual stream: ``Σ_v weights[row, v] directions[v, block]``.

    ``directions``: one entry for each set of vectors, at the blocks listed in ``blocks`` only and
    already in the unit of the coefficients. ``weights``: the coefficients of every row of the
    batch; a single row is shared by all of them, a row of zeros is not steered. ``start``: the
    first absolute position that is steered.
    """

    directions: Float[Tensor, "vector block d_model"]
    weights: Float[Tensor, "row vector"]
    blocks: tuple[int, ...]
    start: int = 0

    @property
    def shared(self) -> bool:
        """Whether one row of weights serves a batch of any size."""
        return self.weights.shape[0] == 1

    def deltas(self, rows: Int[Tensor, "row"] | None = None) -> Float[Tensor, "block row d_model"]:
        """What each block adds to each row (to ``rows`` of them, in that order), in float64."""
        weights = self.weights if rows is None or self.shared else self.weights[rows]
        used = weights.any(dim=0)  # a batch of a large study uses few of its vectors
        return torch.einsum(
            "rv,vbd->brd", weights[:, used].double(), self.directions[used].double()
        )


def intervention(
    model: TransformerBridge,
    vectors: Steering,
    coefficient: Coefficient | None = None,
    *,
    blocks: Iterable[int] | None = None,
    start: int = DEFAULT.start,
    relative: bool = DEFAULT.relative,
) -> Intervention:
    """The arguments of ``steer``, checked and brought into one form."""
    chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
    start = whole("start, an absolute position,", start, 0)
    terms, weights = _terms(vectors, coefficient)
    shape = [model.cfg.n_layers, model.cfg.d_model]
    directions = torch.zeros(len(terms), len(chosen), model.cfg.d_model)
    for i, term in enumerate(terms):
        if not hasattr(term, "directions"):
            raise TypeError(
                "vectors must be a ConceptVectors, a list of pairs (ConceptVectors, coefficient), "
                f"or a ConceptVectors or None for each row; got {type(term).__name__} among them"
            )
        term.check_model(model)
        if list(term.directions.shape) != shape:
            raise ValueError(
                f"vectors.directions must be [layer, d_model] = {shape} for this model, "
                f"got {list(term.directions.shape)}"
            )
        scale = term.resid_norm[:, None] if relative else 1.0
        directions[i] = (term.directions * scale)[list(chosen)]
    if not bool(directions.isfinite().all()):
        raise ValueError("vectors hold entries that are not finite; fit them anew")
    return Intervention(directions, weights, chosen, start)


@contextmanager
def steer(
    model: TransformerBridge,
    vectors: Steering,
    *,
    coefficient: Coefficient | None = None,
    blocks: Iterable[int] | None = None,
    start: int = DEFAULT.start,
    relative: bool = DEFAULT.relative,
) -> Iterator[TransformerBridge]:
    """Add ``ε v[l]`` to ``blocks.{l}.hook_resid_post`` in every forward pass inside the context.

    That holds for plain forward passes, ``generate``, the bridge's ``generate`` and Hugging
    Face's (``model.original_model.generate``). Contexts inside one another add up.

    ``vectors``: one ``ConceptVectors``; pairs ``[(vectors, coefficient), ...]``, whose sum is
    added; or one ``ConceptVectors`` or ``None`` (not steered) for each row of the batch.
    ``coefficient``: ε, a number or one for each row; negative ones suppress, large ones
    over-steer. It must be given, except for pairs, whose coefficients it multiplies.
    ``blocks``: all by default; AGS leaves out the first. ``start``: the first steered position,
    counted in the row's own tokens, padding left out. ``relative``: ε is in units of each
    block's mean residual norm (``vectors.resid_norm``), which differ between blocks and models;
    ``False``: absolute, as AGS has it.

    Until the context ends, the model belongs to the thread that entered it: captures, answers and
    contexts of other threads wait (see ``lenskit.models.use``), so a thread must not wait inside
    for one of them. (Forward passes that other threads run past lenskit are steered too.)

    Raises ValueError for blocks that the model has not, for vectors of another model, for numbers
    that are not finite and, in the forward pass, when the batch has not one row per coefficient.
    """
    planned = intervention(
        model, vectors, coefficient, blocks=blocks, start=start, relative=relative
    )
    with intervene(model, planned):
        yield model


@contextmanager
def intervene(model: TransformerBridge, planned: Intervention) -> Iterator[None]:
    """Apply an intervention to every forward pass inside the context."""
    active = ActiveIntervention(planned)
    with using(model) as note:
        stack = _active.setdefault(model, [])
        note(partial(_leave, stack, active))
        stack.append(active)
        with hooked(model, active.hooks(), before=active.before_forward):
            yield


def _leave(stack: list[ActiveIntervention], active: ActiveIntervention) -> None:
    stack[:] = [each for each in stack if each is not active]


def active_interventions(model: TransformerBridge) -> tuple[ActiveIntervention, ...]:
    """The interventions now applied to the model, the outermost first."""
    return tuple(_active.get(model, ()))


class ActiveIntervention:
    """An intervention at work: the rows that the next forward pass holds, and their positions.

    A generation loop that reorders or drops rows says so with ``batch`` and ``keep``, so that
    every row keeps its own vectors.
    """

    def __init__(self, planned: Intervention) -> None:
        self.planned = planned
        self._gate: Tensor | None = None
        self.batch(None)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows of the intervention the next batches hold; ``None``: all of them."""
        self._rows = torch.arange(len(self.planned.weights)) if rows is None else rows.cpu()
        self._deltas: list[Tensor] = []

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""
        if not self.planned.shared:
            self._rows = self._rows[rows.cpu()]
            self._deltas = [delta[rows.to(delta.device)] for delta in self._deltas]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the number of rows, and find the steered positions of this chunk of tokens."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        rows = len(self._rows)
        if not self.planned.shared and rows != tokens.shape[0]:
            raise ValueError(
                f"steering has coefficients for {rows} rows, but the batch has "
                f"{tokens.shape[0]}; give one for each row (beam search, which copies rows, "
                "needs one coefficient for all)"
            )
        if self.planned.start > 0:
            self._gate = (_positions(tokens, kwargs) >= self.planned.start)[:, :, None]

    def hooks(self) -> list[tuple[str, Any]]:
        """Hook names and functions, for ``model.hooks(fwd_hooks=...)``."""
        return [
            (f"blocks.{block}.hook_resid_post", partial(self._add, i))
            for i, block in enumerate(self.planned.blocks)
        ]

    def _add(self, i: int, resid: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        if not self._deltas:
            self._deltas = list(self.planned.deltas(self._rows)[:, :, None])
        delta = self._deltas[i]
        if delta.dtype != resid.dtype or delta.device != resid.device:
            delta = self._deltas[i] = delta.to(resid.dtype).to(resid.device)
        # Never in place: the stream may be what another hook has kept.
        if self._gate is None:
            return resid + delta
        self._gate = self._gate.to(resid)
        return torch.addcmul(resid, self._gate, delta)


_active: WeakKeyDictionary[Any, list[ActiveIntervention]] = WeakKeyDictionary()


def _terms(
    vectors: Any, coefficient: Coefficient | None
) -> tuple[list[ConceptVectors], Float[Tensor, "row vector"]]:
    """Every set of vectors once, and its coefficient in each row (one row: for all)."""
    if isinstance(vectors, Sequence) and all(isinstance(item, tuple) for item in vectors):
        if not vectors:
            raise ValueError("vectors is empty; give at least one ConceptVectors")
        factor = _numbers(1.0 if coefficient is None else coefficient)
        numbers = [_numbers(weight) for _, weight in vectors]
        counts = {len(each) for each in (factor, *numbers)} - {1}
        if len(counts) > 1:
            raise ValueError(f"coefficients are for different numbers of rows: {sorted(counts)}")
        rows = max(counts, default=1)
        weights = torch.stack([(each * factor).expand(rows) for each in numbers], dim=1)
        return [one for one, _ in vectors], weights
    if coefficient is None:
        raise TypeError(
            "coefficient is needed: for example coefficient=0.5 with relative=True, "
            "half of each block's mean residual norm"
        )
    numbers = _numbers(coefficient)
    if not isinstance(vectors, Sequence):
        return [vectors], numbers[:, None]
    if len(numbers) not in (1, len(vectors)):
        raise ValueError(
            f"coefficient has {len(numbers)} numbers for {len(vectors)} rows of vectors; "
            "give one for each row, or one for all"
        )
    own = {id(one): one for one in vectors if one is not None}
    keys = torch.tensor(list(own), dtype=torch.long)
    rows = torch.tensor([id(one) for one in vectors])
    return list(own.values()), numbers[:, None] * (rows[:, None] == keys)


def _numbers(coefficient: Coefficient) -> Float[Tensor, "row"]:
    given = coefficient.detach().cpu() if isinstance(coefficient, Tensor) else coefficient
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"coefficient must be a number or a list of one for each row, got {coefficient!r}"
        ) from None
    if numbers.ndim > 1 or numbers.numel() == 0:
        raise ValueError(
            f"coefficient must be a number or one for each row, got shape {list(numbers.shape)}"
        )
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"coefficient must be finite, got {numbers.tolist()}")
    return numbers.reshape(-1)


def _positions(tokens: Tensor, kwargs: dict[str, Any]) -> Int[Tensor, "row pos"]:
    """Absolute positions of a chunk, which may follow others that are in the cache."""
    chunk = tokens.shape[1]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return position_ids(mask)[:, -chunk:]
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return positions
    if mask is not None:
        raise ValueError("start > 0 needs a two-dimensional attention_mask, or position_ids")
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + chunk, device=tokens.device)[None]
