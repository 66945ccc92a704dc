"""What steering can add: concept vectors, sums of them, and plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.recipes import DEFAULT
from lenskit.vectors.arithmetic import Combination
from lenskit.vectors.storage import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Array: TypeAlias = Tensor | np.ndarray
Vectors: TypeAlias = (
    ConceptVectors
    | Combination
    | Float[Array, "layer d_model"]
    | Mapping[int, Float[Array, " d_model"]]
)


def parts(one: Vectors | None) -> Sequence[tuple[Any, float]]:
    """What a sum is made of, with its weights; anything else is one part."""
    if one is None:
        return ()
    return one.terms if isinstance(one, Combination) else ((one, 1.0),)


def added(
    model: TransformerBridge, part: Any, relative: bool | None, fingerprint: str | None = None
) -> Float[Tensor, "layer *candidate d_model"]:
    """What one part adds to each block with coefficient 1; ``relative`` as in ``steer``.

    Vectors for each closing token have an axis for these. ``fingerprint``: that of the model,
    where it is known already.

    Raises ``ValueError`` for vectors of another model, for a shape or blocks that the model has
    not, for numbers that are not finite, and for a tensor that is to be relative; ``TypeError``
    for anything else.
    """
    layers, width = model.cfg.n_layers, model.cfg.d_model
    if isinstance(part, ConceptVectors):
        part.check_model(model, fingerprint)
        shape = part.directions.shape
        if (shape[0], shape[-1]) != (layers, width):
            raise ValueError(
                f"vectors.directions must be [layer, d_model] = {[layers, width]} for this model, "
                f"got {list(shape)}"
            )
        if not (DEFAULT.relative if relative is None else relative):
            return part.directions
        return part.directions * part.unit[..., None]
    if relative:
        raise ValueError(
            "relative=True needs ConceptVectors, which know each block's mean residual norm; a "
            "tensor is added as it is, times the coefficient"
        )
    if not isinstance(part, Mapping):
        return _rows(part, "vectors", layer=layers, d_model=width)
    if not part:
        raise ValueError("vectors is empty; give {layer: tensor}")
    rows = torch.zeros(layers, width)
    for layer, row in part.items():
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise TypeError(f"vectors must be {{layer: tensor}}, but {layer!r} is no whole number")
        if not 0 <= layer < layers:
            raise ValueError(
                f"vectors has block {layer}, but the blocks of this model are 0 to {layers - 1}"
            )
        rows[layer] = _rows(row, f"vectors[{layer}]", d_model=width)
    return rows


def _rows(given: Any, name: str, **axes: int) -> Tensor:
    if not isinstance(given, Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be a ConceptVectors or a sum of them, a tensor [layer, d_model], "
            "{layer: tensor}, a list of pairs (vectors, coefficient), or one of these or None "
            f"for each row; got {type(given).__name__}"
        )
    rows = torch.tensor(given) if isinstance(given, np.ndarray) else given.detach().cpu()
    if tuple(rows.shape) != tuple(axes.values()):
        wanted = ", ".join(axes)
        raise ValueError(
            f"{name} must be [{wanted}] = {list(axes.values())} for this model, "
            f"got {list(rows.shape)}"
        )
    if rows.dtype == torch.bool or rows.is_complex() or not bool(rows.float().isfinite().all()):
        raise ValueError(f"{name} must hold finite real numbers")
    return rows.float()
