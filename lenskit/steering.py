"""Activation steering: adding concept vectors to the residual stream (AGS, arXiv 2602.00333).

``H̃[l,t] = H[l,t] + ε v[l]`` at chosen blocks, in a plain forward pass as in cached generation; or
another operation on stream and vector (``lenskit.operations``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit.models import ClosingTokens, applied, cache_of, chunk_of, position_ids, require_rows
from lenskit.operations import Operation, add, apply, find_operations, project_out
from lenskit.recipes import DEFAULT
from lenskit.vectors import ConceptVectors, added, closing_of, parts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import Vectors

    Coefficient: TypeAlias = float | Sequence[float] | Float[Tensor, "row"]
    Pairs: TypeAlias = Sequence[tuple[Vectors, Coefficient]]
    Steering: TypeAlias = Vectors | Pairs | Sequence[Vectors | None]
    Operations: TypeAlias = Operation | str | Sequence[Operation | str]

_NEVER = torch.iinfo(torch.long).max

Positions: TypeAlias = Literal["all", "prompt", "generated", "answer"]
"""Which tokens of a row are steered: all, those of its prompt, those that are generated, or those
that the answer is written from: the last one of the prompt and the generated ones."""

Window: TypeAlias = tuple[int, int | None]
"""From which position on a row is steered, and before which (``None``: up to its end)."""


@dataclass(frozen=True)
class Intervention:
    """What is added to the residual stream: ``Σ_v weights[row, v] directions[v, block]``.

    ``directions``: one entry for each set of vectors, at the blocks listed in ``blocks`` only and
    already in the unit of the coefficients. ``weights``: the coefficients of every row of the
    batch; a single row is shared by all of them, a row of zeros is not steered. ``start``: the
    first absolute position that is steered. ``closing`` and ``candidates``: ids and texts of the
    closing tokens, where vectors are for these; ``directions`` then have places: what is added at
    all other tokens, and at each closing token. ``operations``: what is done with the sum, one for
    all rows or one for each. ``windows``: the positions of each row that are steered, beside
    ``start``; empty where all are.
    """

    directions: Float[Tensor, "vector block *place d_model"]
    weights: Float[Tensor, "row vector"]
    blocks: tuple[int, ...]
    start: int = 0
    closing: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = (add,)
    windows: tuple[Window, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one row of weights serves a batch of any size."""
        return self.weights.shape[0] == 1

    @property
    def placed(self) -> Bool[Tensor, "row"]:
        """The rows to which closing tokens matter."""
        own = (self.directions[:, :, 1:] != self.directions[:, :, :1]).flatten(1).any(dim=1)
        return self.weights[:, own].any(dim=1)

    def deltas(
        self, rows: Int[Tensor, "row"] | None = None
    ) -> Float[Tensor, "block row *place d_model"]:
        """What each block adds to each row (to ``rows`` of them, in that order), in float64."""
        weights = self.weights if rows is None or self.shared else self.weights[rows]
        used = weights.any(dim=0)  # a batch of a large study uses few of its vectors
        return torch.einsum(
            "rv,vb...d->br...d", weights[:, used].double(), self.directions[used].double()
        )


def intervention(
    model: TransformerBridge,
    vectors: Steering,
    coefficient: Coefficient | None = None,
    *,
    blocks: Iterable[int] | None = None,
    start: int = DEFAULT.start,
    relative: bool | None = None,
    operation: Operations = "add",
    windows: Sequence[Window] = (),
) -> Intervention:
    """The arguments of ``steer``, checked and brought into one form; ``windows``: one a row."""
    operations = find_operations(operation)
    if coefficient is None and all(each is project_out for each in operations):
        coefficient = 1.0  # its length does not matter
    chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
    start = whole("start, an absolute position,", start, 0)
    terms, weights = _terms(vectors, coefficient)
    if len(operations) > 1 and len(weights) not in (1, len(operations)):
        raise ValueError(
            f"operation has {len(operations)} entries for {len(weights)} rows; give one for each "
            "row, or one for all"
        )
    weights = weights.expand(max(len(weights), len(operations), len(windows)), -1)
    windows = tuple(windows) if any(each != (0, None) for each in windows) else ()
    if windows and len(windows) != len(weights):
        raise ValueError(f"windows are {len(windows)}, for {len(weights)} rows; give one for each")
    if all(each is operations[0] for each in operations):
        operations = operations[:1]
    closing, candidates = closing_of(terms)
    places = [1 + len(closing)] if closing else []
    directions = torch.zeros(len(terms), len(chosen), *places, model.cfg.d_model)
    for i, term in enumerate(terms):
        rows = added(model, term, relative)[list(chosen)]
        if rows.ndim == 3:
            directions[i, :, 1:] = rows
        else:
            directions[i] = rows[:, None] if closing else rows
        if isinstance(term, Mapping) and not {*term} & {*chosen}:
            raise ValueError(
                f"vectors are given for block(s) {sorted(term)}, of which blocks={list(chosen)} "
                "has none"
            )
    if not bool(directions.isfinite().all()):
        raise ValueError("vectors hold entries that are not finite; fit them anew")
    return Intervention(
        directions, weights, chosen, start, closing, candidates, operations, windows
    )


def window(positions: Positions, length: int) -> Window:
    """The window of a row whose prompt has so many tokens; ValueError for other positions."""
    if positions not in get_args(Positions):
        raise ValueError(
            f"positions must be one of {', '.join(get_args(Positions))}; got {positions!r}"
        )
    return {"generated": (length, None), "answer": (length - 1, None), "prompt": (0, length)}.get(
        positions, (0, None)
    )


@contextmanager
def steer(
    model: TransformerBridge,
    vectors: Steering,
    *,
    coefficient: Coefficient | None = None,
    blocks: Iterable[int] | None = None,
    start: int = DEFAULT.start,
    relative: bool | None = None,
    operation: Operations = "add",
) -> Iterator[TransformerBridge]:
    """Add ``ε v[l]`` to ``blocks.{l}.hook_resid_post`` in every forward pass inside the context.

    That holds for plain forward passes, ``generate``, the bridge's ``generate`` and Hugging
    Face's (``model.original_model.generate``). Contexts inside one another act one after the
    other, the outermost first; additions add up.

    ``vectors``: a ``ConceptVectors``; a sum such as ``2 * v - w``, or as pairs ``[(v, 2),
    (w, -1)]``; a tensor or array ``[layer, d_model]``, or ``{layer: tensor}`` for some blocks;
    or one of these, or ``None`` (not steered), for each row of the batch.
    ``coefficient``: ε, a number or one for each row; negative ones suppress, large ones
    over-steer. It multiplies what is given, and must be there for ``ConceptVectors`` alone and
    for a list of rows; sums, pairs and tensors have lengths of their own.
    ``blocks``: all by default; AGS leaves out the first. ``start``: the first steered position,
    counted in the row's own tokens, padding left out. ``relative``: ε is in units of each
    block's mean residual norm (``vectors.resid_norm``), which differ between blocks and models;
    ``False``: absolute, as AGS has it; by default as ``lk.recipes`` says. A tensor knows no such
    norm: it is added as it is, times ε.
    ``operation``: what is done with ``δ = ε v[l]``, one for all rows or one for each. "add";
    "project_out" (nothing is left along ``v``; needs no ε); "clamp" (the projection on ``v``
    becomes ``ε |v|``); "raise_to" (the same, only where it is below); "add_keeping_norm"; "rotate"
    (towards ``v``, along an arc as long as ``δ``); or a function ``(resid, delta) -> resid``
    (``lenskit.operations``). Where ``δ`` is zero nothing is changed.

    Vectors for each closing token (``fit_vectors(capture, "each")``) are added at that token of the
    prompt's end and nowhere else: other tokens of the prompt, earlier turns and generated tokens
    stay as they are. The end is found by the tokens' ids: the closing tokens that come last in the
    row, in the pass that begins without a cache. (For a plain pass over a prompt and its answer,
    tokenize them apart; the answer must not hold the closing tokens again.) These vectors of a
    block have equal lengths: a relative coefficient is in units of the mean norm over all closing
    tokens, and is a larger share of the stream where the token's own norm is smaller.

    Until the context ends, the model belongs to the thread that entered it: captures, answers and
    contexts of other threads wait (see ``lenskit.models.use``), so a thread must not wait inside
    for one of them. (Forward passes that other threads run past lenskit are steered too.)

    Raises ValueError for blocks that the model has not, for vectors of another model or shape, for
    ``relative=True`` with a tensor, for numbers that are not finite and, in the forward pass, when
    the batch has not one row per coefficient, or a row lacks the closing tokens.

    >>> question = concept.questions[0]
    >>> with lk.steer(model, vectors, coefficient=0.04):
    ...     answer = lk.generate(model, question, max_new_tokens=8)
    >>> with lk.steer(model, {3: vectors[3]}, coefficient=2.0), lk.steer(model, -0.01 * vectors):
    ...     another = lk.generate(model, question, max_new_tokens=8)
    >>> with lk.steer(model, vectors, operation="project_out"):
    ...     neutral = lk.generate(model, question, max_new_tokens=8)
    """
    planned = intervention(
        model,
        vectors,
        coefficient,
        blocks=blocks,
        start=start,
        relative=relative,
        operation=operation,
    )
    with intervene(model, planned):
        yield model


@contextmanager
def intervene(model: TransformerBridge, planned: Intervention) -> Iterator[None]:
    """Apply an intervention to every forward pass inside the context."""
    with applied(model, ActiveIntervention(planned)):
        yield


class ActiveIntervention:
    """An intervention at work: the rows that the next forward pass holds, and their positions.

    A generation loop that reorders or drops rows says so with ``batch`` and ``keep``, so that
    every row keeps its own vectors.
    """

    what = "steering has coefficients"

    def __init__(self, planned: Intervention) -> None:
        self.planned = planned
        self._gate: Tensor | None = None
        self._place: Tensor | None = None
        self._closing = ClosingTokens(planned.closing, planned.candidates)
        self._placed = planned.placed if planned.closing else None
        self.batch(None)

    @property
    def number(self) -> int | None:
        """For how many rows it was made; ``None`` serves a batch of any size."""
        return None if self.planned.shared else len(self.planned.weights)

    def batch(self, rows: Int[Tensor, "row"] | None) -> None:
        """Say which rows of the intervention the next batches hold; ``None``: all of them."""
        self._rows = torch.arange(len(self.planned.weights)) if rows is None else rows.cpu()
        self._deltas: list[Tensor] = []
        self._closing.forget()

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Say which rows of the present batch are left in the next forward pass."""
        if not self.planned.shared:
            self._rows = self._rows[rows.cpu()]
            self._deltas = [delta[rows.to(delta.device)] for delta in self._deltas]

    def before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the number of rows, and find the steered positions of this chunk of tokens."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        require_rows(self, len(self._rows), tokens.shape[0])
        if self.planned.start > 0 or self.planned.windows:
            self._gate = self._inside(_positions(tokens, kwargs))[:, :, None]
        if self._placed is not None:
            needed = self._placed if self.planned.shared else self._placed[self._rows]
            self._place = self._closing.places(chunk_of(args, kwargs), needed)

    def hooks(self) -> list[tuple[str, Any]]:
        """Hook names and functions, for ``model.hooks(fwd_hooks=...)``."""
        return [
            (f"blocks.{block}.hook_resid_post", partial(self._add, i))
            for i, block in enumerate(self.planned.blocks)
        ]

    def _inside(self, positions: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        inside = positions >= self.planned.start
        if not self.planned.windows:
            return inside
        rows = [self.planned.windows[row] for row in self._rows.tolist()]
        first = torch.tensor([each for each, _ in rows], device=positions.device)
        stop = torch.tensor([_NEVER if s is None else s for _, s in rows], device=positions.device)
        return inside & (positions >= first[:, None]) & (positions < stop[:, None])

    def _add(self, i: int, resid: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        if not self._deltas:
            deltas = self.planned.deltas(self._rows)
            self._deltas = list(deltas if self.planned.closing else deltas[:, :, None])
        delta = self._deltas[i]
        plainly = self.planned.operations == (add,)
        # Norms and angles are of the vector as it is, whatever the stream is rounded to.
        exact = resid.dtype if plainly else torch.promote_types(resid.dtype, torch.float32)
        if delta.dtype != exact or delta.device != resid.device:
            delta = self._deltas[i] = delta.to(exact).to(resid.device)
        delta = self._at_places(delta)
        # Never in place: the stream may be what another hook has kept.
        if self._gate is None:
            return resid + delta if plainly else self._changed(resid, delta)
        if plainly:
            self._gate = self._gate.to(resid)
            return torch.addcmul(resid, self._gate, delta)
        self._gate = self._gate.to(resid.device, torch.bool)
        return torch.where(self._gate, self._changed(resid, delta), resid)

    def _changed(
        self, resid: Float[Tensor, "row pos d_model"], delta: Float[Tensor, "row #pos d_model"]
    ) -> Tensor:
        """The stream after each row's own operation."""
        planned = self.planned.operations
        own = planned if len(planned) == 1 else [planned[row] for row in self._rows.tolist()]
        return apply(own, resid, delta)

    def _at_places(self, delta: Float[Tensor, "row place d_model"]) -> Tensor:
        """What is added at each position of this pass; one entry where it is the same at all."""
        if self._place is None:
            return delta[:, :1]
        place = self._place.to(delta.device)[:, :, None].expand(-1, -1, delta.shape[-1])
        return delta.expand(len(place), -1, -1).gather(1, place)


def _terms(
    vectors: Any, coefficient: Coefficient | None
) -> tuple[list[Any], Float[Tensor, "row vector"]]:
    """What is added, as it was given, and its coefficient in each row (one row: for all)."""
    by_row = isinstance(vectors, Sequence) and not all(isinstance(one, tuple) for one in vectors)
    if coefficient is None and (by_row or isinstance(vectors, ConceptVectors)):
        raise TypeError(
            "coefficient is needed: for example coefficient=0.5 with relative=True, "
            "half of each block's mean residual norm"
        )
    factor = _numbers(1.0 if coefficient is None else coefficient)
    if by_row:
        if len(factor) not in (1, len(vectors)):
            raise ValueError(
                f"coefficient has {len(factor)} numbers for {len(vectors)} rows of vectors; "
                "give one for each row, or one for all"
            )
        own = {id(term): term for one in vectors for term, _ in parts(one)}
        places = {key: place for place, key in enumerate(own)}
        weights = torch.zeros(len(vectors), len(own), dtype=torch.float64)
        for row, one in enumerate(vectors):
            for term, weight in parts(one):
                weights[row, places[id(term)]] += weight
        return list(own.values()), weights * factor[:, None]
    pairs = vectors if isinstance(vectors, Sequence) else [(vectors, 1.0)]
    if not pairs:
        raise ValueError("vectors is empty; give at least one ConceptVectors")
    given = [(term, _numbers(each) * own) for one, each in pairs for term, own in parts(one)]
    counts = {len(each) for each in (factor, *(numbers for _, numbers in given))} - {1}
    if len(counts) > 1:
        raise ValueError(f"coefficients are for different numbers of rows: {sorted(counts)}")
    rows = max(counts, default=1)
    weights = torch.stack([(numbers * factor).expand(rows) for _, numbers in given], dim=1)
    return [term for term, _ in given], weights


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
    cache = cache_of(kwargs)
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + chunk, device=tokens.device)[None]
