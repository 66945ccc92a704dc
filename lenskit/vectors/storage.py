"""``ConceptVectors``: the directions of all blocks with what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenskit._display import Displayed, quoted, spread
from lenskit.vectors.arithmetic import Arithmetic

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.concepts import Concept
    from lenskit.vectors.arithmetic import Terms

FORMAT = "lenskit-concept-vectors"
# Files of version 1 have no checksum, and are still read; only those with a direction for each
# closing token are of version 3, and only those with displacements of version 4.
FORMAT_VERSION, CLOSING_VERSION, DISPLACED_VERSION = "2", "3", "4"
LARGEST = 2**32
UNIT = 1e-3
TENSORS = ("directions", "validation", "resid_norm")
DISPLACEMENT = "displacement"
TEXTS = ("model", "learner", "selection", "labels", "data_hash", "version")


@dataclass(frozen=True, repr=False)
class ConceptVectors(Arithmetic, Displayed):
    """A direction for each block, or for each block and closing token, and its provenance.

    ``directions``: float32 on the CPU, unit norm (or zero where a block has none), the sign such
    that the projection on them correlates positively with the labels. ``validation``: absolute
    Pearson correlation of projection and labels on the validation rows, nan if unknown.
    ``resid_norm``: mean norm of ``resid_post`` over prompts and candidate tokens, the unit of
    relative coefficients. ``model``: fingerprint of the model. ``data_hash``: SHA-256 of token
    ids, mask and labels. ``version``: of lenskit. ``candidates`` and ``closing``: texts and token
    ids of the closing tokens, where each has a direction of its own, which ``steer`` adds there
    and nowhere else (``fit_vectors(capture, "each")``). ``displacement``: how far the prefix moves
    the stream along each direction; where it is given (recipe "lenskit"), it is the unit of
    relative coefficients instead, and the closing tokens keep their relative lengths.

    ``len(v)`` is the number of blocks and ``v[layer]`` a block's direction. ``2 * v``, ``-v``,
    ``v / 2``, ``v + w`` and ``v - w`` are combinations that ``steer`` takes.

    >>> len(vectors) == len(2 * vectors), vectors[3].shape == (model.cfg.d_model,)
    (True, True)
    >>> other = lk.fit_vectors(capture, tokens=-1, progress=False)
    >>> with lk.steer(model, vectors - 0.5 * other, coefficient=0.04):
    ...     answer = lk.generate(model, concept.questions[0], max_new_tokens=8)
    """

    directions: Float[Tensor, "layer *candidate d_model"]
    validation: Float[Tensor, "layer *candidate"]
    resid_norm: Float[Tensor, " layer"]
    model: str
    concept: Concept
    learner: str
    selection: str
    labels: str
    data_hash: str
    version: str
    candidates: tuple[str, ...] = ()
    closing: tuple[int, ...] = ()
    displacement: Float[Tensor, "layer *candidate"] | None = None

    def __post_init__(self) -> None:
        shape, places = tuple(self.directions.shape), len(self.closing)
        if len(self.candidates) != places:
            raise ValueError(
                f"candidates and closing must be texts and ids of the same tokens, got "
                f"{self.candidates} and {self.closing}"
            )
        if shape[1:-1] != ((places,) if places else ()) or len(shape) < 2:
            axes = f"[layer, candidate={places}, d_model]" if places else "[layer, d_model]"
            raise ValueError(
                f"directions must be {axes} with {places or 'no'} closing tokens, got shape {shape}"
            )
        tensors = {"validation": shape[:-1], "resid_norm": shape[:1]}
        if self.displacement is not None:
            tensors[DISPLACEMENT] = shape[:-1]
        for name, wanted in tensors.items():
            if tuple(getattr(self, name).shape) != wanted:
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.directions)} blocks"
                    f"{' and closing tokens' if len(wanted) > 1 else ''}, "
                    f"got shape {tuple(getattr(self, name).shape)}"
                )

    def _headline(self) -> str:
        return f"ConceptVectors of {self.concept.name!r}, {len(self)} blocks"

    def _rows(self) -> dict[str, object]:
        known = self.validation.nan_to_num(-1.0).view(len(self), -1).mean(dim=1)
        best = f"; best in block {int(known.argmax())}" if bool((known >= 0).any()) else ""
        shown = super()._rows()
        del shown["closing"]
        if self.displacement is None:
            del shown[DISPLACEMENT]
        else:
            shown[DISPLACEMENT] = f"the unit, {spread(self.displacement.flatten().tolist())}"
        if self.closing:
            shown["candidates"] = f"a direction each: {quoted(self.candidates)}"
        else:
            del shown["candidates"]
        return shown | {
            "validation": f"correlation {spread(self.validation.flatten().tolist())}{best}",
            "resid_norm": spread(self.resid_norm.tolist()),
            "data_hash": self.data_hash[:12],
        }

    @property
    def terms(self) -> Terms:  # type: ignore[override]
        """The vectors as a sum of one, with weight 1."""
        return ((self, 1.0),)

    @property
    def unit(self) -> Float[Tensor, "layer *candidate"]:
        """The length that a relative coefficient of 1 adds along each direction."""
        if self.displacement is not None:
            return self.displacement
        axes = self.directions.shape[1:-1]
        return self.resid_norm.view(-1, *[1] * len(axes)).expand(-1, *axes)

    def check_model(self, model: TransformerBridge, fingerprint: str | None = None) -> None:
        """Raise ``ValueError`` unless the vectors were made with this model.

        ``fingerprint``: that of the model, where it is known already.
        """
        from lenskit.models import model_fingerprint, same_model

        fingerprint = fingerprint or model_fingerprint(model)
        if not same_model(fingerprint, self.model):
            raise ValueError(
                f"the vectors of concept {self.concept.name!r} were made with model {self.model}, "
                f"but the model is {fingerprint}; load that model, or fit the vectors anew"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, and everything else in its metadata.

        A checksum of all that is among it. Raises ``ValueError`` for what ``load`` would refuse.
        """
        names = (*TENSORS, DISPLACEMENT) if self.displacement is not None else TENSORS
        tensors = {name: getattr(self, name).float().cpu().contiguous() for name in names}
        _check_values(tensors)
        metadata = {name: getattr(self, name) for name in TEXTS}
        metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        if self.closing:
            metadata["format_version"] = CLOSING_VERSION
            metadata |= {
                name: json.dumps(getattr(self, name)) for name in ("candidates", "closing")
            }
        if self.displacement is not None:
            metadata["format_version"] = DISPLACED_VERSION
        metadata["concept"] = json.dumps(asdict(self.concept))
        metadata["checksum"] = checksum(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge | None = None) -> ConceptVectors:
        """Read a file written by ``save``; nothing in it is executed.

        Raises ``ValueError`` when it is no such file, is of another format version, is not as it
        was written (by its checksum, which files before version 2 have not), has shapes that do
        not fit each other, directions that are neither of unit norm nor zero, entries that are
        not finite or norms that are negative, or when ``model`` is given and is not the one that
        the vectors were made with.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no concept vectors (its metadata names the format "
                f"{metadata.get('format')!r}, not {FORMAT!r})"
            )
        version = metadata.get("format_version")
        if version not in ("1", FORMAT_VERSION, CLOSING_VERSION, DISPLACED_VERSION):
            raise ValueError(
                f"{path} has format version {version!r}; this lenskit reads versions 1 to "
                f"{DISPLACED_VERSION}"
            )
        if version != "1" and metadata.pop("checksum", None) != checksum(tensors, metadata):
            raise ValueError(f"{path} is damaged: it is not what its checksum was made of")
        wanted = (*TENSORS, DISPLACEMENT) if version == DISPLACED_VERSION else TENSORS
        missing = [name for name in wanted if name not in tensors]
        placed = version == CLOSING_VERSION or (
            version == DISPLACED_VERSION and "closing" in metadata
        )
        own = ("candidates", "closing") if placed else ()
        missing += [name for name in (*TEXTS, "concept", *own) if name not in metadata]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        try:
            _check_values(tensors)
            fields: dict[str, Any] = {name: tensors[name].float() for name in wanted}
            fields |= {name: metadata[name] for name in TEXTS}
            if own:
                fields |= {name: tuple(json.loads(metadata[name])) for name in own}
                _check_closing(fields["candidates"], fields["closing"])
            vectors = cls(**fields, concept=_concept(metadata["concept"]))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if model is not None:
            vectors.check_model(model)
        return vectors


def check_file(path: str | Path, most: int = LARGEST) -> None:
    """Raise ValueError for what is no ordinary file (a FIFO would be read for ever) or too large.

    Raises ``FileNotFoundError`` where nothing is there.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size:,} bytes, more than vectors ever need")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError names it where it cannot be read."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 of tensors, with their names, dtypes and shapes, and of texts, in any order."""
    digest = hashlib.sha256(repr(sorted(texts.items())).encode("utf-8", "backslashreplace"))
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the blocks whose directions or norms cannot be meant."""
    for name in (*TENSORS, DISPLACEMENT):
        if name in tensors and not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be of floats, got {tensors[name].dtype}")
    directions, norms = tensors["directions"].double(), tensors["resid_norm"]
    moved = tensors.get(DISPLACEMENT, norms)
    sizes = directions.norm(dim=-1)
    wrong = {
        "directions that are not finite": ~directions.isfinite().all(dim=-1),
        "directions that are neither of unit norm nor zero": (
            ((sizes - 1).abs() > UNIT) & (sizes > 0)
        ),
        "residual norms that are negative or not finite": ~(norms.isfinite() & (norms >= 0)),
        "displacements that are negative or not finite": ~(moved.isfinite() & (moved >= 0)),
        "validation that is no correlation": tensors["validation"].abs() > 1 + UNIT,
    }
    for what, each in wrong.items():
        bad = each.flatten(1).any(dim=1) if each.ndim > 1 else each
        if bool(bad.any()):
            blocks = ", ".join(map(str, bad.nonzero().flatten().tolist()))
            raise ValueError(f"{what}, at block(s) {blocks}")


def _check_closing(candidates: tuple[Any, ...], closing: tuple[Any, ...]) -> None:
    if not closing or not all(type(token) is int and token >= 0 for token in closing):
        raise ValueError("closing must be the ids of one closing token or more")
    if not all(isinstance(text, str) for text in candidates):
        raise ValueError("candidates must be texts")


def _concept(text: str) -> Concept:
    from lenskit.concepts import Concept

    fields = json.loads(text)
    texts = [fields[name] for name in ("prefix", "name")] + list(fields.get("questions", ()))
    if fields.get("concept_class") is not None:
        texts.append(fields["concept_class"])
    if not isinstance(fields.get("questions", []), list) or not all(
        isinstance(one, str) for one in texts
    ):
        raise ValueError("the concept's prefix, name, class and questions must be texts")
    return Concept(**(fields | {"questions": tuple(fields.get("questions", ()))}))
