"""What relevance does to the keys of each head: directions, their mass, and how far keys move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed, count, spread
from lenskit.attention.heads import Heads
from lenskit.models import model_fingerprint, same_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FORMAT, FORMAT_VERSION = "lenskit-key-projections", "1"
TENSORS = ("relevant", "irrelevant", "relevant_mass", "irrelevant_mass", "shift")
TEXTS = ("model", "data_hash", "version")
NUMBERS = {"mass": float, "group": int, "tokens": int}
_SLACK = 1e-3


@dataclass(frozen=True, repr=False, eq=False)
class KeyProjections(Displayed):
    """What ``fit_key_projections`` learns of every key-value head, and its provenance.

    ``relevant`` and ``irrelevant``: float32 on the CPU, the left singular vectors of ``Ω⁺`` and
    ``Ω⁻``, one in each column, that with most mass first; ``relevant_mass`` and
    ``irrelevant_mass``: their singular values. ``shift``: the mean distance of a token's key with a
    question that it answers from its key with another. ``mass``: the share of the singular mass
    that is kept. ``group``: how many heads share a key-value head. ``tokens``: how many were read.
    ``model``: fingerprint of the model. ``data_hash``: SHA-256 of the prompts and spans.
    ``version``: of lenskit.

    >>> texts = ["The library opens at nine.", "Rain falls on the hills."]
    >>> asked = ["When does the library open?", "Where does rain fall?"]
    >>> pairs = zip(texts, asked, reversed(asked), strict=True)
    >>> examples = [lk.key_contrast(model, text, text[:-1], *two) for text, *two in pairs]
    >>> projections = lk.fit_key_projections(model, examples, progress=False)
    >>> len(projections.heads(4)) == 4 * projections.group
    True
    """

    relevant: Float[Tensor, "layer kv_head d_head component"]
    irrelevant: Float[Tensor, "layer kv_head d_head component"]
    relevant_mass: Float[Tensor, "layer kv_head component"]
    irrelevant_mass: Float[Tensor, "layer kv_head component"]
    shift: Float[Tensor, "layer kv_head"]
    mass: float
    group: int
    tokens: int
    model: str
    data_hash: str
    version: str

    def __post_init__(self) -> None:
        shape = tuple(self.relevant.shape)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"relevant must be [layer, kv_head, d_head, d_head], got {shape}")
        wanted = (shape, shape, shape[:3], shape[:3], shape[:2])
        for name, expected in zip(TENSORS, wanted, strict=True):
            if tuple(getattr(self, name).shape) != expected:
                raise ValueError(
                    f"{name} must have the shape {expected} beside relevant, got "
                    f"{tuple(getattr(self, name).shape)}"
                )
        share("mass", self.mass)
        whole("group, the heads that share a key-value head,", self.group, 1)

    def _headline(self) -> str:
        blocks, heads = self.shift.shape
        return f"KeyProjections of {blocks} blocks of {count(heads, 'key-value head')}"

    def _rows(self) -> dict[str, object]:
        shown = super()._rows()
        for name in ("relevant", "irrelevant", "relevant_mass", "irrelevant_mass"):
            del shown[name]
        return shown | {
            "shift": spread(self.shift.flatten().tolist()),
            "rank": f"{spread(self.rank.flatten().tolist())}, of {self.relevant.shape[-1]}",
            "data_hash": self.data_hash[:12],
        }

    @property
    def rank(self) -> Int[Tensor, "layer kv_head"]:
        """Of each ``P⁺``: the fewest directions that hold ``mass`` of the singular mass."""
        return _rank(self.relevant_mass, self.mass)

    @property
    def positive(self) -> Float[Tensor, "layer kv_head d_head d_head"]:
        """``P⁺``: on the directions that hold ``mass`` of ``Ω⁺``."""
        return _onto(self.relevant, self.rank)

    @property
    def negative(self) -> Float[Tensor, "layer kv_head d_head d_head"]:
        """``P⁻``: on what the directions that hold ``mass`` of ``Ω⁻`` leave; 0 without ``Ω⁻``."""
        top = _onto(self.irrelevant, _rank(self.irrelevant_mass, self.mass))
        learnt = self.irrelevant_mass.sum(dim=-1) > 0
        return torch.where(learnt[..., None, None], torch.eye(top.shape[-1]) - top, 0.0)

    def heads(self, number: int | None = None, *, shift: float | None = None) -> Heads:
        """The heads whose keys move most with relevance: ``number`` of them, or from ``shift`` on.

        A key-value head that serves several heads comes with all of them, and counts once.
        Published with a threshold on the shift. Its unit is that of the model's keys.

        Raises ValueError unless one of the two is given, and where no head moves so far.
        """
        flat, per_block = self.shift.flatten(), self.shift.shape[1]
        if number is not None and shift is None:
            number = whole("number, of key-value heads,", number, 1, len(flat))
            chosen = flat.argsort(descending=True, stable=True)[:number].tolist()
        elif shift is not None and number is None:
            chosen = (flat >= shift).nonzero()[:, 0].tolist()
        else:
            raise ValueError("give number, of key-value heads, or shift, from which on they count")
        if not chosen:
            raise ValueError(
                f"no key-value head moves by shift={shift}; the most is {float(flat.max()):.4g}"
            )
        return Heads(
            (each // per_block, each % per_block * self.group + own)
            for each in chosen
            for own in range(self.group)
        )

    def random(self, seed: int) -> KeyProjections:
        """A control: directions drawn at random, as many as these in every head."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, *self.relevant.shape, generator=generator, dtype=torch.float64)
        relevant, irrelevant = torch.linalg.qr(drawn).Q.float()
        learnt = self.irrelevant_mass.sum(dim=-1)[..., None, None] > 0
        return replace(self, relevant=relevant, irrelevant=torch.where(learnt, irrelevant, 0.0))

    def check_model(self, model: TransformerBridge) -> None:
        """Raise ``ValueError`` unless the projections were fitted on this model."""
        fingerprint = model_fingerprint(model)
        if not same_model(fingerprint, self.model):
            raise ValueError(
                f"the key projections were fitted on model {self.model}, but the model is "
                f"{fingerprint}; load that model, or fit them anew"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, and the rest with a checksum in its metadata.

        Raises ``ValueError`` for what ``load`` would refuse.
        """
        from lenskit.vectors import checksum

        tensors = {name: getattr(self, name).float().cpu().contiguous() for name in TENSORS}
        _check_values(tensors)
        metadata = {name: str(getattr(self, name)) for name in (*TEXTS, *NUMBERS)}
        metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        metadata["checksum"] = checksum(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge | None = None) -> KeyProjections:
        """Read a file written by ``save``; nothing in it is executed.

        Raises ``ValueError`` when it is no such file, is not as it was written, holds what cannot
        be meant, or when ``model`` is given and is not the one that they were fitted on.
        """
        from lenskit.vectors import checksum, read_safetensors

        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no key projections (its metadata names the format "
                f"{metadata.get('format')!r}, not {FORMAT!r})"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {metadata.get('format_version')!r}; this lenskit reads "
                f"version {FORMAT_VERSION}"
            )
        if metadata.pop("checksum", None) != checksum(tensors, metadata):
            raise ValueError(f"{path} is damaged: it is not what its checksum was made of")
        if missing := [
            *(name for name in TENSORS if name not in tensors),
            *(name for name in (*TEXTS, *NUMBERS) if name not in metadata),
        ]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        try:
            _check_values(tensors)
            fields: dict[str, Any] = {name: tensors[name].float() for name in TENSORS}
            fields |= {name: metadata[name] for name in TEXTS}
            fields |= {name: kind(metadata[name]) for name, kind in NUMBERS.items()}
            projections = cls(**fields)
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if model is not None:
            projections.check_model(model)
        return projections


def share(name: str, value: float) -> float:
    """A share above 0, at most 1; raises ValueError for others."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share above 0 and at most 1, got {value!r}")
    return float(value)


def _rank(
    values: Float[Tensor, "layer kv_head component"], mass: float
) -> Int[Tensor, "layer kv_head"]:
    """The fewest of the largest values that hold this share of their sum; 0 where it is 0."""
    total = values.double().sum(dim=-1)
    reached = values.double().cumsum(dim=-1) < mass * (1 - 1e-12) * total[..., None]
    return (reached.sum(dim=-1) + 1).clamp(max=values.shape[-1]) * (total > 0)


def _onto(
    vectors: Float[Tensor, "layer kv_head d_head component"], rank: Int[Tensor, "layer kv_head"]
) -> Float[Tensor, "layer kv_head d_head d_head"]:
    """The projection on the first ``rank`` vectors."""
    kept = vectors * (torch.arange(vectors.shape[-1]) < rank[..., None])[..., None, :]
    return kept @ kept.mT


def _check_values(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError that says what of the tensors cannot be meant."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must hold finite floats")
        if name not in ("relevant", "irrelevant"):
            if bool((tensor < 0).any()):
                raise ValueError(f"{name} must not be negative")
            continue
        # Without an Ω they are all zero.
        product = tensor.double().mT @ tensor.double()
        lengths = product.diagonal(dim1=-2, dim2=-1)
        expected = torch.diag_embed((lengths > 0.5).double())
        if not bool(((product - expected).abs() < _SLACK).all()):
            raise ValueError(f"{name} must hold orthonormal vectors, or zeros")
