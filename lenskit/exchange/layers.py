"""``{layer: vector}``, the form in which repeng and steering-vectors hold their vectors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import save_file

from lenskit import __version__
from lenskit._arguments import block_numbers
from lenskit.concepts import Concept
from lenskit.models import model_fingerprint, same_model
from lenskit.vectors import ConceptVectors, checksum, read_safetensors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# What each library calls its dictionary: the first part of a tensor's name in a safetensors file.
_ATTRIBUTE = {"repeng": "directions", "steering-vectors": "layer_activations"}


def to_layers(
    vectors: ConceptVectors,
    *,
    coefficient: float = 1.0,
    relative: bool = False,
    blocks: Iterable[int] | None = None,
) -> dict[int, Float[np.ndarray, " d_model"]]:
    """``{layer: vector}``, float32, as repeng and steering-vectors hold them.

    ``ControlVector(model_type=..., directions=to_layers(vectors))`` is repeng's, and
    ``SteeringVector({l: torch.from_numpy(v) for l, v in to_layers(vectors).items()})`` that of
    steering-vectors. ``blocks``: all but the first by default, as AGS steers (the others too
    leave it out). ``coefficient`` and ``relative`` as in ``steer``.

    Raises ValueError for blocks that the vectors have not, for numbers that are not finite, and for
    vectors of each closing token: the others have one vector for a layer, added at every token.
    """
    if vectors.closing:
        raise ValueError(
            f"the vectors of {vectors.concept.name!r} have one for each closing token, "
            f"{vectors.candidates}, but these formats hold one for a layer, which is added at "
            "every token; fit vectors of one token in each block (tokens='attention')"
        )
    number = len(vectors.directions)
    chosen = sorted(block_numbers("blocks", blocks, number)[blocks is None :])
    scale = vectors.unit if relative else torch.ones(number)
    scaled = (vectors.directions * (scale * coefficient)[:, None])[list(chosen)].float().cpu()
    if not bool(scaled.isfinite().all()):
        raise ValueError(
            f"vectors times coefficient={coefficient} hold numbers that are not finite"
        )
    rows = zip(chosen, scaled.numpy(), strict=True)
    # A row of zeros stands for a block without vector.
    return {block: row.copy() for block, row in rows if row.any()}


def from_layers(
    layers: Mapping[int, Any],
    model: TransformerBridge,
    *,
    concept: Concept | None = None,
    layer_type: str = "decoder_block",
    learner: str = "imported",
) -> ConceptVectors:
    """``ConceptVectors`` for ``model`` from repeng's or steering-vectors' ``{layer: vector}``.

    ``layers``: ``ControlVector.directions`` or ``SteeringVector.layer_activations``; arrays or
    tensors of shape [d_model]. ``layer_type``: that of the ``SteeringVector``. The norms become
    ``resid_norm``; ``validation`` is NaN. Blocks without a vector have zeros.

    Raises ValueError for another layer type, for layers or a d_model that the model has not, and
    for vectors that are zero or not finite.
    """
    if layer_type != "decoder_block":
        raise ValueError(
            f"layer_type {layer_type!r} is not where concept vectors are added; only vectors for "
            "'decoder_block', the output of a block, can be imported"
        )
    cfg = model.cfg
    if not layers:
        raise ValueError("layers holds no vector; give {layer: vector}")
    directions = torch.zeros(cfg.n_layers, cfg.d_model)
    norms = torch.zeros(cfg.n_layers)
    for layer, given in layers.items():
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise ValueError(f"layer {layer!r} is not a whole number")
        if not 0 <= layer < cfg.n_layers:
            raise ValueError(
                f"layer {layer} is not among the model's blocks 0 to {cfg.n_layers - 1}; the "
                "vectors seem to be another model's"
            )
        vector = torch.as_tensor(given).detach().cpu()
        if not vector.is_floating_point():
            raise ValueError(f"layer {layer} has a vector of {vector.dtype} and not of floats")
        vector = vector.double()
        if vector.shape != (cfg.d_model,):
            raise ValueError(
                f"layer {layer} has a vector of shape {list(vector.shape)}, but the model's "
                f"d_model is {cfg.d_model}; the vectors seem to be another model's"
            )
        norm = vector.norm()
        if not bool(norm.float().isfinite()) or norm.float() == 0:
            raise ValueError(f"layer {layer} has a vector that is zero or not finite in float32")
        directions[layer], norms[layer] = (vector / norm).float(), norm.float()
    return ConceptVectors(
        directions=directions,
        validation=torch.full_like(norms, float("nan")),
        resid_norm=norms,
        model=model_fingerprint(model),
        concept=concept or Concept(prefix="(imported; its prefix is not known)", name="imported"),
        learner=learner,
        selection="",
        labels="",
        data_hash="",
        version=__version__,
    )


def write_layers(
    vectors: ConceptVectors,
    path: str | Path,
    library: Literal["repeng", "steering-vectors"],
    *,
    model_type: str = "",
    coefficient: float = 1.0,
    relative: bool = False,
    blocks: Iterable[int] | None = None,
) -> Path:
    """Write ``to_layers`` as a safetensors file, since both libraries only pickle theirs.

    Its tensors are ``directions.{layer}`` for repeng and ``layer_activations.{layer}`` for
    steering-vectors, after the attribute that they belong into. The metadata holds
    ``model_type`` (repeng wants Hugging Face's) or ``layer_type``.
    """
    if library not in _ATTRIBUTE:
        raise ValueError(f"library must be one of {list(_ATTRIBUTE)}, got {library!r}")
    layers = to_layers(vectors, coefficient=coefficient, relative=relative, blocks=blocks)
    if not layers:
        raise ValueError("there is nothing to write: the vectors of these blocks are zero")
    notes = {f"lenskit.{name}": text for name, text in provenance(vectors, layers).items()}
    notes |= {"model_type": model_type} if library == "repeng" else {"layer_type": "decoder_block"}
    tensors = {f"{_ATTRIBUTE[library]}.{layer}": vector for layer, vector in layers.items()}
    with replacing(Path(path)) as file:
        save_file(tensors, file, metadata=notes)
    return Path(path)


def read_layers(
    path: str | Path,
    model: TransformerBridge,
    *,
    concept: Concept | None = None,
    other_model: bool = False,
) -> ConceptVectors:
    """Read a file of ``write_layers``, or any of the same tensor names, for ``model``.

    Arguments and errors as in ``read_gguf``.
    """
    tensors, notes = read_safetensors(path)
    layers: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, number = name.rpartition(".")
        if kind not in _ATTRIBUTE.values():
            raise ValueError(f"{path} holds {name!r}; expected directions.N or layer_activations.N")
        add_layer(layers, name, number, tensor, path)
    ours = {n.removeprefix("lenskit."): v for n, v in notes.items() if n.startswith("lenskit.")}
    layer_type = notes.get("layer_type", "decoder_block")
    return checked(layers, model, concept, ours, path, other_model, layer_type)


def checked(
    layers: Mapping[int, Any],
    model: TransformerBridge,
    concept: Concept | None,
    notes: Mapping[str, str],
    path: str | Path,
    other_model: bool,
    layer_type: str = "decoder_block",
) -> ConceptVectors:
    """``from_layers`` with what the file itself says of model and concept."""
    if (written := notes.get("checksum")) and written != _checksum(layers):
        raise ValueError(f"{path} is damaged: its vectors are not what its checksum was made of")
    written_for, own = notes.get("model"), model_fingerprint(model)
    if written_for and not same_model(written_for, own) and not other_model:
        raise ValueError(
            f"{path} was written for the model {written_for}, and this is {own}; "
            "other_model=True reads it all the same"
        )
    if concept is None and notes.get("concept.prefix"):
        concept = Concept(
            prefix=notes["concept.prefix"],
            name=notes.get("concept.name", "custom"),
            concept_class=notes.get("concept.class") or None,
        )
    learner = notes.get("learner") or "imported"
    try:
        return from_layers(layers, model, concept=concept, layer_type=layer_type, learner=learner)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def add_layer(
    layers: dict[int, Any], name: str, number: str, vector: Any, path: str | Path
) -> None:
    """Put a vector where its name says; raises ValueError for no number, or one that is taken."""
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise ValueError(f"{path} holds {name!r}, which ends in no number of a layer")
    if int(number) in layers:
        raise ValueError(f"{path} holds more than one vector for layer {int(number)}: {name!r}")
    layers[int(number)] = vector


def _checksum(layers: Mapping[int, Any]) -> str:
    return checksum({str(n): torch.as_tensor(each).float() for n, each in layers.items()}, {})


def provenance(vectors: ConceptVectors, layers: Mapping[int, Any]) -> dict[str, str]:
    """What a file says of its vectors, and the checksum of what it holds of them."""
    return {
        "checksum": _checksum(layers),
        "model": vectors.model,
        "concept.prefix": vectors.concept.prefix,
        "concept.name": vectors.concept.name,
        "concept.class": vectors.concept.concept_class or "",
        "learner": vectors.learner,
        "selection": vectors.selection,
        "labels": vectors.labels,
    }


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield file
        file.replace(path)
    finally:
        file.unlink(missing_ok=True)
