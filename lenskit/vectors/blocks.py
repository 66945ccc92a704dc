"""Concept vectors in some blocks only, and as what each block adds to the one before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenskit.models import RESID, hooked, run_plain, using
from lenskit.vectors.storage import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.capture import Capture

_PROMPTS = 32


def in_blocks(
    vectors: ConceptVectors, blocks: Sequence[int], said: object = None
) -> ConceptVectors:
    """The vectors at these blocks, zero at all others; ValueError for blocks that they have not."""
    number = len(vectors)
    if not blocks or not all(0 <= block < number for block in blocks):
        said = list(blocks) if said is None else said
        raise ValueError(f"blocks {said!r} must be among 0 to {number - 1} for this model")
    kept = vectors.directions.new_zeros(vectors.directions.shape)
    kept[list(blocks)] = 1
    return replace(vectors, directions=vectors.directions * kept)


@torch.no_grad()
def increments(
    model: TransformerBridge, capture: Capture, vectors: ConceptVectors, *, prompts: int = _PROMPTS
) -> ConceptVectors:
    """What is still missing at each block of the displacement that the vectors stand for.

    Each closing token's vector of a block, less what the additions in earlier blocks already carry
    there: so that with coefficient 1 the stream at the closing tokens is moved by the whole
    displacement at every block, and not by several of them on top of each other. What is carried
    is the mean over the first ``prompts`` prompts without the prefix, in one forward pass in which
    each block is measured and then moved.

    ``vectors``: of each closing token, with displacements (``fit_vectors(capture, "each",
    recipe=...)`` with a recipe whose unit is the displacement); ``capture``: that they were fitted
    to. Raises ValueError for others, and where no prompt is without a prefix.

    >>> from dataclasses import replace
    >>> displaced = replace(lk.recipes["lenskit"], token="each", blocks="all")
    >>> whole = lk.fit_vectors(capture, recipe=displaced, model=model, progress=False)
    >>> added = lk.increments(model, capture, whole)
    >>> bool((added.displacement[1:] < whole.displacement[1:]).any())
    True
    """
    if vectors.displacement is None or not vectors.closing:
        raise ValueError(
            "increments need the displacement of each closing token, and these vectors are of "
            f"{vectors.selection}; fit them with a recipe of unit 'displacement' and token 'each'"
        )
    vectors.check_model(model)
    places = len(vectors.closing)
    if capture.model != vectors.model or capture.resid_post.shape[2] != places:
        raise ValueError("capture is not that which the vectors were fitted to; capture anew")
    bare = (~capture.prompts.has_prefix).nonzero()[:prompts, 0]
    if not len(bare):
        raise ValueError("capture has no prompt without a prefix to measure increments on")
    plain = capture.resid_post[bare]
    whole = vectors.directions * vectors.displacement[..., None]
    missing = torch.zeros_like(whole)

    def moving(layer: int) -> Callable[..., Tensor]:
        def move(resid: Tensor, hook: object) -> Tensor:
            carried = (resid[:, -places:].float().cpu() - plain[:, layer]).mean(dim=0)
            missing[layer] = whole[layer] - carried
            # Never in place: the stream may be what another hook has kept.
            moved = resid.clone()
            moved[:, -places:] += missing[layer].to(moved)
            return moved

        return move

    tokens = capture.prompts.tokens.rows(bare).trimmed().to(model.cfg.device)
    hooks = [(f"blocks.{layer}.{RESID}", moving(layer)) for layer in range(len(vectors))]
    with using(model), hooked(model, hooks):
        run_plain(model.original_model, tokens, use_cache=False)
    lengths = missing.norm(dim=-1)
    return replace(
        vectors,
        directions=torch.nn.functional.normalize(missing, dim=-1),
        displacement=lengths,
        selection=f"{vectors.selection}, in increments",
    )
