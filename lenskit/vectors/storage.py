"""``ConceptVectors``: the directions of all blocks with what they were made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenskit._display import Displayed, spread
from lenskit.vectors.arithmetic import Arithmetic

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.concepts import Concept
    from lenskit.vectors.arithmetic import Terms

FORMAT = "lenskit-concept-vectors"
FORMAT_VERSION = "1"
TENSORS = ("directions", "validation", "resid_norm")
TEXTS = ("model", "learner", "selection", "labels", "data_hash", "version")


@dataclass(frozen=True, repr=False)
class ConceptVectors(Arithmetic, Displayed):
    """A direction for each block, float32 on the CPU, and its provenance.

    ``directions``: unit norm (or zero where a block has none), the sign such that the projection
    on them correlates positively with the labels. ``validation``: absolute Pearson correlation of
    projection and labels on the validation rows, nan if unknown. ``resid_norm``: mean norm of
    ``resid_post`` over prompts and candidate tokens, the unit of relative coefficients.
    ``model``: fingerprint of the model. ``data_hash``: SHA-256 of token ids, mask and labels.
    ``version``: of lenskit.

    ``len(v)`` is the number of blocks and ``v[layer]`` a block's direction. ``2 * v``, ``-v``,
    ``v / 2``, ``v + w`` and ``v - w`` are combinations that ``steer`` takes.
    """

    directions: Float[Tensor, "layer d_model"]
    validation: Float[Tensor, " layer"]
    resid_norm: Float[Tensor, " layer"]
    model: str
    concept: Concept
    learner: str
    selection: str
    labels: str
    data_hash: str
    version: str

    def __post_init__(self) -> None:
        if self.directions.ndim != 2:
            raise ValueError(
                f"directions must be [layer, d_model], got shape {tuple(self.directions.shape)}"
            )
        for name in ("validation", "resid_norm"):
            shape = tuple(getattr(self, name).shape)
            if shape != (len(self.directions),):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.directions)} blocks, "
                    f"got shape {shape}"
                )

    def _headline(self) -> str:
        return f"ConceptVectors of {self.concept.name!r}, {len(self)} blocks"

    def _rows(self) -> dict[str, object]:
        known = self.validation.nan_to_num(-1.0)
        best = f"; best in block {int(known.argmax())}" if bool((known >= 0).any()) else ""
        return super()._rows() | {
            "validation": f"correlation {spread(self.validation.tolist())}{best}",
            "resid_norm": spread(self.resid_norm.tolist()),
            "data_hash": self.data_hash[:12],
        }

    @property
    def terms(self) -> Terms:  # type: ignore[override]
        """The vectors as a sum of one, with weight 1."""
        return ((self, 1.0),)

    def check_model(self, model: TransformerBridge) -> None:
        """Raise ``ValueError`` unless the vectors were made with this model."""
        from lenskit.models import model_fingerprint, same_model

        fingerprint = model_fingerprint(model)
        if not same_model(fingerprint, self.model):
            raise ValueError(
                f"the vectors of concept {self.concept.name!r} were made with model {self.model}, "
                f"but the model is {fingerprint}; load that model, or fit the vectors anew"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, and everything else in its metadata."""
        tensors = {name: getattr(self, name).float().cpu().contiguous() for name in TENSORS}
        metadata = {name: getattr(self, name) for name in TEXTS}
        metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        metadata["concept"] = json.dumps(asdict(self.concept))
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge | None = None) -> ConceptVectors:
        """Read a file written by ``save``; nothing in it is executed.

        Raises ``ValueError`` when it is no such file, is of another format version, has shapes
        that do not fit each other or entries that are not finite, or when ``model`` is given and
        is not the one that the vectors were made with.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no concept vectors (its metadata names the format "
                f"{metadata.get('format')!r}, not {FORMAT!r})"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {metadata.get('format_version')!r}; this lenskit "
                f"reads version {FORMAT_VERSION!r}"
            )
        missing = [name for name in TENSORS if name not in tensors]
        missing += [name for name in (*TEXTS, "concept") if name not in metadata]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        if not all(torch.isfinite(tensors[name]).all() for name in ("directions", "resid_norm")):
            raise ValueError(f"{path} has directions or residual norms that are not finite")
        try:
            vectors = cls(
                **{name: tensors[name].float() for name in TENSORS},
                **{name: metadata[name] for name in TEXTS},
                concept=_concept(metadata["concept"]),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if model is not None:
            vectors.check_model(model)
        return vectors


def _concept(text: str) -> Concept:
    from lenskit.concepts import Concept

    fields = json.loads(text)
    return Concept(**(fields | {"questions": tuple(fields.get("questions", ()))}))
