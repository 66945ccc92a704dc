"""Concept vectors from causal sites: clean minus corrupt activations where patching restores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenskit import __version__
from lenskit._arguments import whole
from lenskit.attention import Span
from lenskit.causal.jobs import prepare
from lenskit.causal.measures import Target
from lenskit.causal.patching import patched
from lenskit.causal.prompts import Positions, Prompt
from lenskit.concepts import Concept
from lenskit.models import model_fingerprint, using
from lenskit.prompts import PromptSet
from lenskit.vectors import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def fit_vectors(
    model: TransformerBridge,
    pairs: PromptSet | Sequence[tuple[Prompt, Prompt]],
    concept: Concept | str | None = None,
    *,
    targets: Sequence[Target | None] | None = None,
    against: Sequence[str | Sequence[int] | None] | None = None,
    positions: Positions | Span | None = None,
    sites: int = 1,
    batch_size: int = 64,
    progress: bool = True,
) -> ConceptVectors:
    """A unit vector for each block: the mean of clean minus corrupt at the sites that restore most.

    Of each pair the clean prompt's ``resid_post`` is patched into the corrupt one, at one block and
    position after the other. In every block the ``sites`` positions whose patch moves the measure
    farthest from the corrupt prompt's to the clean one's give their differences of activations;
    their mean over the pairs is the block's vector. A position that restores nothing gives none,
    and a block without any has a vector of zeros.

    ``pairs``: (clean, corrupt) prompts, or a ``PromptSet`` with partners (with the prefix, without
    it), of which the candidate tokens are patched. ``targets``, ``against`` and ``positions`` as
    in ``patch_pairs``; without a target the measure is the likeness of the next token.
    ``resid_norm`` is the mean norm over both prompts and the positions tried, but the first token.
    ``validation`` is not known (nan).

    Raises ``ValueError`` where the clean and the corrupt prompt of every pair measure alike.

    >>> pairs = [("What do you fear?", "What do you like?")]
    >>> causal = lk.causal.fit_vectors(model, pairs, "fear", positions=[-1], progress=False)
    >>> causal.labels, len(causal) == model.cfg.n_layers
    ('causal', True)
    """
    sites = whole("sites", sites, 1)
    if isinstance(pairs, PromptSet):
        concept = pairs.concept if concept is None else concept
        positions = range(-len(pairs.candidates), 0) if positions is None else positions
        pairs = _partners(pairs)
    if concept is None:
        raise TypeError("concept is needed: a Concept, or a name for what the clean prompts show")
    pairs = list(pairs)
    number, layers = len(pairs), model.cfg.n_layers
    none: Sequence[None] = [None] * number
    with using(model):
        jobs = prepare(
            model,
            [(corrupt, clean) for clean, corrupt in pairs],
            none if targets is None else targets,
            none if against is None else against,
            "resid_post",
            batch_size,
        )
        found = patched(
            model,
            jobs,
            "resid_post",
            blocks=None,
            positions=positions,
            batch_size=batch_size,
            progress=progress,
        )
    if not any(abs(job.goal - job.plain) > 1e-6 for job in jobs):
        raise ValueError("the clean and corrupt prompts measure alike, so that nothing is restored")
    sums = torch.zeros(layers, model.cfg.d_model, dtype=torch.float64)
    norms: list[Tensor] = []
    for job, result in zip(jobs, found, strict=True):
        effects = result.effects * (1 if job.goal > job.plain else -1)
        tried = sorted({place for group in result.places for place in group} - {0}) or [0]
        norms += [each[:, tried].float().norm(dim=-1).cpu() for each in (job.own, job.new)]
        difference = (job.new.double() - job.own.double()).cpu()
        for block, column in _best(effects, sites):
            sums[block] += difference[block, list(result.places[column])].mean(dim=0)
    sizes = sums.norm(dim=-1, keepdim=True)
    return ConceptVectors(
        directions=torch.where(sizes > 0, sums / sizes, 0.0).float(),
        validation=torch.full((layers,), float("nan")),
        resid_norm=torch.cat(norms, dim=1).mean(dim=1),
        model=model_fingerprint(model),
        concept=concept if isinstance(concept, Concept) else Concept(concept, name=concept),
        learner="mean of clean minus corrupt",
        selection=f"the {sites} of {len(found[0].places)} positions that restore most, by patching",
        labels="causal",
        data_hash=_data_hash([each for job in jobs for each in (job.row.ids, job.measure.name)]),
        version=__version__,
    )


def _partners(prompts: PromptSet) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt with the prefix and of its partner without it."""
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(prompts.tokens.input_ids, prompts.tokens.attention_mask, strict=True)
    ]
    found = [
        (ids[row], ids[other])
        for row, other in enumerate(prompts.pair.tolist())
        if other >= 0 and bool(prompts.has_prefix[row])
    ]
    if not found:
        raise ValueError("the prompts have no partners; build them with layout='paired'")
    return found


def _best(effects: Tensor, sites: int) -> Iterable[tuple[int, int]]:
    """Block and column of the greatest positive effects of every block."""
    order = effects.argsort(dim=1, descending=True, stable=True)[:, :sites]
    for block, columns in enumerate(order.tolist()):
        yield from ((block, column) for column in columns if effects[block, column] > 0)


def _data_hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()
