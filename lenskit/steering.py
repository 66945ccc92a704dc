"""Activation steering: adding concept vectors to the residual stream (AGS, arXiv 2602.00333).

``H̃[l,t] = H[l,t] + ε v[l]`` at chosen blocks, in a plain forward pass as in cached generation; or
another operation on stream and vector (``lenskit.operations``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit.intervention import Intervention, Window, intervene
from lenskit.models import model_fingerprint
from lenskit.operations import Operation, find_operations, project_out
from lenskit.recipes import LOOK, Recipe, find_recipe
from lenskit.vectors import ConceptVectors, added, closing_of, parts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.vectors import Vectors

    Coefficient: TypeAlias = float | Sequence[float] | Float[Tensor, "row"]
    Pairs: TypeAlias = Sequence[tuple[Vectors, Coefficient]]
    Steering: TypeAlias = Vectors | Pairs | Sequence[Vectors | None]
    Operations: TypeAlias = Operation | str | Sequence[Operation | str]


def intervention(
    model: TransformerBridge,
    vectors: Steering,
    coefficient: Coefficient | None = None,
    *,
    blocks: Iterable[int] | None = None,
    start: int | None = None,
    relative: bool | None = None,
    operation: Operations = "add",
    windows: Sequence[Window] = (),
    recipe: Recipe | str | None = None,
) -> Intervention:
    """The arguments of ``steer``, checked and brought into one form; ``windows``: one a row."""
    operations = find_operations(operation)
    known = find_recipe(recipe)
    start = known.start if start is None else start
    if coefficient is None and all(each is project_out for each in operations):
        coefficient = 1.0  # its length does not matter
    if coefficient is None and recipe is not None:
        coefficient = known.coefficient
    layers = model.cfg.n_layers
    chosen = block_numbers("blocks", blocks, layers)
    start = whole("start, an absolute position,", start, 0)
    terms, weights = _terms(vectors, coefficient)
    if recipe is not None:
        if relative is None and any(isinstance(term, ConceptVectors) for term in terms):
            relative = known.relative
        _check_unit(terms, known, relative)
        if blocks is None and not (known.blocks == LOOK and _displaced(terms)):
            chosen = block_numbers("blocks", known.blocks_of(layers), layers)
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
    named = any(isinstance(term, ConceptVectors) for term in terms)
    fingerprint = model_fingerprint(model) if named else None
    for i, term in enumerate(terms):
        rows = added(model, term, relative, fingerprint)[list(chosen)]
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


@contextmanager
def steer(
    model: TransformerBridge,
    vectors: Steering,
    *,
    coefficient: Coefficient | None = None,
    blocks: Iterable[int] | None = None,
    start: int | None = None,
    relative: bool | None = None,
    operation: Operations = "add",
    recipe: Recipe | str | None = None,
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
    norm: it is added as it is, times ε. Vectors with a ``displacement`` have it as their unit
    instead: ε = 1 adds what the prefix itself does.
    ``recipe``: whose blocks, start, unit and, where it has one, coefficient are taken where they
    are not given.
    ``operation``: what is done with ``δ = ε v[l]``, one for all rows or one for each. "add";
    "project_out" (nothing is left along ``v``; needs no ε); "clamp" (the projection on ``v``
    becomes ``ε |v|``); "raise_to" (the same, only where it is below); "add_keeping_norm"; "rotate"
    (towards ``v``, along an arc as long as ``δ``); or a function ``(resid, delta) -> resid``
    (``lenskit.operations``). Where ``δ`` is zero nothing is changed.

    Vectors for each closing token (``fit_vectors(capture, "each")``) are added at that token of the
    prompt's end and nowhere else: other tokens of the prompt, earlier turns and generated tokens
    stay as they are. The end is found by the tokens' ids: the closing tokens that come last in the
    row, in the pass that begins without a cache. (For a plain pass over a prompt and its answer,
    tokenize them apart; the answer must not hold the closing tokens again.) Without displacements
    these vectors of a block have equal lengths: a relative coefficient is in units of the mean norm
    over all closing tokens, and is a larger share of the stream where the token's own is smaller.

    Until the context ends, the model belongs to the thread that entered it: captures, answers and
    contexts of other threads wait (see ``lenskit.models.use``), so a thread must not wait inside
    for one of them. (Forward passes that other threads run past lenskit are steered too.)

    Raises ValueError for blocks that the model has not, for vectors of another model or shape, for
    ``relative=True`` with a tensor, for vectors in another unit than the recipe's, for a recipe
    that is still to look at the model (``lk.look``), for numbers that are not finite and, in the
    forward pass, when the batch has not one row per coefficient, or a row lacks the closing tokens.

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
        recipe=recipe,
    )
    with intervene(model, planned):
        yield model


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


def _check_unit(terms: Sequence[Any], recipe: Recipe, relative: bool | None) -> None:
    """Raise ValueError for vectors whose relative coefficients mean something else."""
    for term in terms:
        if not isinstance(term, ConceptVectors) or not relative:
            continue
        own = "resid_norm" if term.displacement is None else "displacement"
        if own != recipe.unit:
            raise ValueError(
                f"recipe {recipe.name!r} has coefficients in units of {recipe.unit}, but the "
                f"vectors of {term.concept.name!r} are in units of {own}; fit them with that "
                "recipe, or leave recipe out"
            )


def _displaced(terms: Sequence[Any]) -> bool:
    """Whether all are vectors of a settled look, which are zero where they do not act."""
    return all(getattr(term, "displacement", None) is not None for term in terms)


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
