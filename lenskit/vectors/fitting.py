"""``fit_vectors``: run a learner on the activations of every block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from lenskit import __version__
from lenskit._progress import Bars
from lenskit.labels import find_labels
from lenskit.recipes import INCREMENTS, Recipe, find_recipe
from lenskit.selector import find_tokens, fixed_token
from lenskit.vectors.blocks import in_blocks, increments
from lenskit.vectors.learner import Direction, oriented, pearson, split
from lenskit.vectors.learners import FitFunction, direction_of, find_learner
from lenskit.vectors.rfm.grid import each_block
from lenskit.vectors.rfm.machine import RecursiveFeatureMachine
from lenskit.vectors.storage import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.capture import Capture
    from lenskit.selector import TokenSelection

    Selector = Callable[[Capture], TokenSelection]
    Labeller = Callable[[Capture, TokenSelection], Float[Tensor, "prompt layer"]]


def fit_vectors(
    capture: Capture,
    tokens: TokenSelection | Selector | str | int | None = None,
    labels: Float[Tensor, "prompt layer"] | ArrayLike | Labeller | str | None = None,
    *,
    learner: Any | FitFunction | str | None = None,
    recipe: Recipe | str | None = None,
    model: TransformerBridge | None = None,
    seed: int = 0,
    validation: float = 0.2,
    max_validation: int = 256,
    progress: bool = True,
) -> ConceptVectors:
    """A unit vector for each block, learnt from ``resid_post`` at the selected token (AGS).

    Rows are L2-normalised; the first 80 % of the prompts train, the last 20 %, at most
    ``max_validation``, validate. Each vector's sign is by its own block's labels, over all
    prompts.

    ``tokens``: a selection, a function of the capture that makes one, "attention" (Eq. 3) or an
    offset such as -1; or "each": a vector for every candidate token, learnt as if it were selected
    in all blocks, which ``steer`` adds at that token of a prompt and nowhere else.
    ``labels``: a name ("soft" (Eq. 4), "hard", "gating or hard" …), a function of capture and
    selection, or numbers, one for each prompt or [prompt, layer].
    ``learner``: a name in ``LEARNERS``; an estimator whose ``fit`` takes ``X, y`` or ``X, y,
    X_val, y_val`` and leaves ``direction_`` or ``coef_``, which is cloned for every block and gets
    ``seed`` as its ``random_state`` if it has one that is None; or a function
    ``(X, y, X_val, y_val) -> direction`` of arrays.
    What is not given is the recipe's: by default the attention-guided token, hard labels and the
    covariance with the labels, which for hard labels is the mean difference; ``recipe="paper"``
    has soft labels and RFM, and gives raw rows to other learners (``lk.recipes`` says why).

    A recipe that names its blocks by number, such as one that ``lk.look`` has settled, leaves the
    vectors of all others zero; one that adds increments, or has labels by "divergence", needs the
    ``model``. Where its unit is the
    displacement, the vectors know how far the stream moves along each direction from label 0 to
    label 1: the slope of the projection on it.

    Raises ``ValueError`` naming the block for activations that are not finite or all zero, for
    labels that are not finite, for training or validation labels that are all equal, and where
    the learner finds no direction; for a selection among other candidates or blocks; and for a
    recipe that is still to look at the model, or adds increments and is given no model.

    >>> lk.fit_vectors(capture, learner="ridge", progress=False).learner
    'Ridge()'
    >>> lk.fit_vectors(capture, -1, "hard", learner="pca", progress=False).selection
    'token -1'
    >>> own = lk.fit_vectors(capture, "each", progress=False)
    >>> own.directions.shape == (len(own), len(capture.candidates), model.cfg.d_model)
    True
    """
    recipe = find_recipe(recipe)
    recipe.require_settled()
    if recipe.blocks == INCREMENTS:
        if model is None:
            raise ValueError(
                f"recipe {recipe.name!r} adds increments, which are measured on the model; give "
                "model=model"
            )
        whole = fit_vectors(
            capture,
            tokens,
            labels,
            learner=learner,
            recipe=replace(recipe, blocks="all"),
            model=model,
            seed=seed,
            validation=validation,
            max_validation=max_validation,
            progress=progress,
        )
        return increments(model, capture, whole)
    learner = find_learner(learner, recipe)
    if not 0 < validation < 1:
        raise ValueError(
            f"validation must be a share of the prompts between 0 and 1, got {validation!r}"
        )
    if max_validation < 2:
        raise ValueError(f"max_validation must be 2 prompts or more, got {max_validation!r}")
    tokens = recipe.token if tokens is None else tokens
    labels = recipe.labels if labels is None else labels
    if isinstance(labels, str) and labels != "soft":
        # Those of Eq. 4 alone depend on the token.
        labels = find_labels(capture, fixed_token(capture), labels, model)
    if isinstance(tokens, str) and tokens == "each":
        places = len(capture.candidates)
        alone = [
            fit_vectors(
                capture,
                place - places,
                labels,
                learner=learner,
                recipe=recipe,
                seed=seed,
                validation=validation,
                max_validation=max_validation,
                progress=progress,
            )
            for place in range(places)
        ]
        return _joined(capture, alone)
    tokens = find_tokens(capture, tokens)
    labels = find_labels(capture, tokens, labels)
    shape = capture.resid_post.shape[:2]
    unit = recipe.unit_rows == "all" or isinstance(learner, RecursiveFeatureMachine)
    prompts, layers = shape
    train = split(prompts, validation, max_validation)
    y = labels.double().mT
    _check_labels(y, train)
    rows, norms = zip(
        *(_rows(capture, tokens, layer, unit) for layer in range(layers)), strict=True
    )
    X = torch.stack(rows)
    directions, scores, moved = [], [], []
    with Bars(disable=not progress) as bar:
        task = bar.add_task("Fitting vectors", total=layers)
        for layer, found in enumerate(_directions(learner, X, y, train, seed)):
            with _naming(layer):
                direction = oriented(found, X[layer].numpy(), y[layer].numpy())
            directions.append(direction)
            held_out = X[layer, train:].numpy() @ direction
            scores.append(abs(pearson(held_out, y[layer, train:].numpy())))
            moved.append(_displacement(capture, tokens, layer, y[layer], direction))
            bar.advance(task)
    made = ConceptVectors(
        directions=torch.from_numpy(np.stack(directions)).float(),
        validation=torch.tensor(scores),
        resid_norm=torch.stack(norms),
        model=capture.model,
        concept=capture.prompts.concept,
        learner=_name(learner),
        selection=tokens.rule,
        labels="hard" if bool(((labels == 0) | (labels == 1)).all()) else "soft",
        data_hash=_data_hash(capture, labels),
        version=__version__,
        displacement=torch.stack(moved) if recipe.unit == "displacement" else None,
    )
    chosen = recipe.blocks_of(layers) if recipe.blocks[0].isdecimal() else None
    return made if chosen is None else in_blocks(made, chosen)


def _joined(capture: Capture, alone: Sequence[ConceptVectors]) -> ConceptVectors:
    """Vectors of every candidate token from those of each."""
    ids = capture.prompts.tokens.input_ids[0, -len(alone) :]
    hashes = "".join(one.data_hash for one in alone)
    moved = [one.displacement for one in alone if one.displacement is not None]
    return replace(
        alone[-1],
        directions=torch.stack([one.directions for one in alone], dim=1),
        validation=torch.stack([one.validation for one in alone], dim=1),
        selection="each candidate token its own",
        labels="soft" if any(one.labels == "soft" for one in alone) else "hard",
        data_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        candidates=tuple(capture.candidates),
        closing=tuple(ids.tolist()),
        displacement=torch.stack(moved, dim=1) if moved else None,
    )


def _rows(
    capture: Capture, tokens: TokenSelection, layer: int, unit: bool
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, ""]]:
    states = capture.resid_post[:, layer, int(tokens.index[layer])].float()
    norms = states.norm(dim=-1)
    bad = int((~states.isfinite()).any(-1).sum()), int((norms == 0).sum())
    for number, what in zip(bad, ("not finite", "all zero"), strict=True):
        if number:
            raise ValueError(
                f"resid_post of block {layer} is {what} in {number} of {len(states)} prompts; "
                "capture with the model in float32 or bfloat16"
            )
    # Over all candidates, so that relative coefficients mean the same whichever token is selected.
    rows = states / norms[:, None] if unit else states
    return rows, capture.resid_post[:, layer].float().norm(dim=-1).mean()


def _displacement(
    capture: Capture,
    tokens: TokenSelection,
    layer: int,
    y: Float[Tensor, " prompt"],
    direction: Direction,
) -> Float[Tensor, ""]:
    """How far the stream moves along the direction from label 0 to label 1.

    The slope of the projection on it by least squares; of hard labels the difference of the means.
    """
    states = capture.resid_post[:, layer, int(tokens.index[layer])].double()
    along = states @ torch.from_numpy(direction).double()
    centred = y - y.mean()
    return (centred @ along / (centred @ centred)).abs().float()


def _check_labels(y: Float[Tensor, "layer prompt"], train: int) -> None:
    parts = {
        "labels are not all finite": ~y.isfinite().all(-1),
        f"{train} training labels are all equal": (y[:, :train] == y[:, :1]).all(-1),
        f"{y.shape[1] - train} validation labels are all equal": (
            y[:, train:] == y[:, train : train + 1]
        ).all(-1),
    }
    for what, bad in parts.items():
        if bool(bad.any()):
            blocks = ", ".join(map(str, bad.nonzero().flatten().tolist()))
            raise ValueError(
                f"the {what} at block(s) {blocks}; interleave prompts with and without the prefix"
            )


@contextmanager
def _naming(layer: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"block {layer}: {error}") from error


def _directions(
    learner: Any | FitFunction,
    X: Float[Tensor, "layer prompt d_model"],
    y: Float[Tensor, "layer prompt"],
    train: int,
    seed: int,
) -> Iterator[Direction]:
    parts = X[:, :train], y[:, :train], X[:, train:], y[:, train:]
    if isinstance(learner, RecursiveFeatureMachine):
        for direction, *_ in each_block(*parts, **learner.get_params(deep=False)):
            yield direction.cpu().numpy()
        return
    for layer, of_block in enumerate(zip(*(part.numpy() for part in parts), strict=True)):
        with _naming(layer):
            direction = direction_of(learner, of_block, seed)
        yield direction


def _name(learner: Any | FitFunction) -> str:
    if hasattr(learner, "fit"):
        return " ".join(repr(learner).split())
    return getattr(learner, "__name__", type(learner).__name__)


def _data_hash(capture: Capture, labels: Float[Tensor, "prompt layer"]) -> str:
    digest = hashlib.sha256()
    tokens = capture.prompts.tokens
    for ids, mask in zip(tokens.input_ids.cpu(), tokens.attention_mask.cpu().bool(), strict=True):
        # Without the padding, which depends on the other prompts.
        digest.update(repr(ids[mask].tolist()).encode())
    digest.update(repr(tuple(labels.shape)).encode())
    digest.update(labels.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
