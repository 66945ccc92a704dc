"""GGUF control vectors of llama.cpp; see the package's docstring for the numbering."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lenskit.concepts import Concept
from lenskit.exchange.layers import add_layer, checked, provenance, replacing, to_layers
from lenskit.vectors import ConceptVectors, check_file

if TYPE_CHECKING:
    from types import ModuleType

    from transformer_lens.model_bridge import TransformerBridge

_ARCHITECTURE = "controlvector"


def write_gguf(
    vectors: ConceptVectors,
    path: str | Path,
    *,
    model_hint: str | None = None,
    coefficient: float = 1.0,
    relative: bool = False,
    blocks: Iterable[int] | None = None,
) -> Path:
    """Write a control vector for llama.cpp (``--control-vector-scaled PATH:S``); returns the path.

    ``model_hint``: llama.cpp's name of the architecture, such as "llama" or "qwen2" (it is not
    checked there); by default the model's name. ``coefficient``, ``relative`` and ``blocks`` as in
    ``to_layers``. The numbering is explained in ``lenskit.exchange``.

    Raises ValueError when block 0 is asked for, ImportError without the package ``gguf``.
    """
    layers = to_layers(vectors, coefficient=coefficient, relative=relative, blocks=blocks)
    if 0 in layers:
        raise ValueError("blocks must not hold 0: llama.cpp can add nothing to the first block")
    if not layers:
        raise ValueError("there is nothing to write: the vectors of these blocks are zero")
    writer_class = _gguf().GGUFWriter
    with replacing(Path(path)) as file:
        writer = writer_class(file, _ARCHITECTURE)
        try:
            hint = model_hint or vectors.model.rsplit(":", 1)[0]
            writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
            for name, text in provenance(vectors, layers).items():
                writer.add_string(f"lenskit.{name}", text)
            for layer, vector in layers.items():
                writer.add_tensor(f"direction.{layer}", vector)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(path)


def read_gguf(
    path: str | Path,
    model: TransformerBridge,
    *,
    concept: Concept | None = None,
    other_model: bool = False,
) -> ConceptVectors:
    """Read a control vector of llama.cpp, repeng or ``write_gguf`` for ``model``.

    ``concept``: by default the one that ``write_gguf`` noted. ``other_model`` admits a file that
    says that it was written for other weights (one from a base model, say). A ``direction.0``,
    which repeng may write and llama.cpp refuses, is that of block 0.

    Raises ValueError, with the file's name, for a file that is no GGUF file, is damaged, is no
    control vector, or does not fit the model (see ``from_layers``), ImportError without the
    package ``gguf``. (Only files of ``write_gguf`` have a checksum.)
    """
    reader_class = _gguf().GGUFReader
    check_file(path)
    try:
        layers, count, notes = _read(reader_class(path), path)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        # The package checks little of what it reads, and fails in many ways.
        raise ValueError(
            f"{path} is no GGUF file, or is damaged: {type(error).__name__}: {error}"
        ) from error
    if count > model.cfg.n_layers:
        raise ValueError(
            f"{path} counts {count} layers, but the model has {model.cfg.n_layers} blocks; the "
            "vectors seem to be another model's"
        )
    return checked(layers, model, concept, notes, path, other_model)


class _Refused(ValueError):
    """What is wrong with a file that could be read."""


def _read(reader: Any, path: str | Path) -> tuple[dict[int, np.ndarray], int, dict[str, str]]:
    """The vectors by layer, how many layers the file counts, and what we noted in it."""
    architecture = _value(reader, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise _Refused(
            f"{path} is no control vector: its general.architecture is {architecture!r} and not "
            f"{_ARCHITECTURE!r}"
        )
    layers: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        kind, _, number = tensor.name.partition(".")
        if kind != "direction" or not number.isdecimal():
            raise _Refused(f"{path} holds {tensor.name!r}; a control vector has direction.N only")
        if tensor.tensor_type.name != "F32":
            raise _Refused(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}, but llama.cpp reads "
                "directions as F32 only"
            )
        # The reader maps the file into memory; what we keep must outlive it.
        add_layer(layers, tensor.name, number, np.array(tensor.data, dtype=np.float32), path)
    names = [name for name in reader.fields if name.startswith("lenskit.")]
    notes = {name.removeprefix("lenskit."): str(_value(reader, name)) for name in names}
    return layers, int(_value(reader, f"{_ARCHITECTURE}.layer_count") or 0), notes


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the package gguf: pip install 'lenskit[gguf]'"
        ) from error
    return gguf
