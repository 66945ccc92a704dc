"""What is patched: prompts run once, what replaces their activations, and the sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit.attention import Span
from lenskit.causal.measures import Measure, Target, likeness, measure_of
from lenskit.causal.prompts import (
    Groups,
    Positions,
    Prompt,
    Read,
    block_groups,
    counterparts,
    position_groups,
    read_prompt,
    token_texts,
)
from lenskit.causal.results import Patching
from lenskit.causal.runs import activations, require_landing
from lenskit.causal.sources import Mean, Source, mean_values
from lenskit.models import model_fingerprint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Job:
    """One prompt and what its sites are replaced by.

    ``own`` and ``new``: the activations of the prompt and what replaces them. ``first``: the first
    position that can be patched. ``plain`` and ``goal``: the measure of prompt and source.
    """

    prompt: Read
    measure: Measure
    own: Float[Tensor, "block pos *width"]
    new: Float[Tensor, "block pos *width"]
    first: int
    plain: float
    goal: float

    @property
    def row(self) -> Read:
        """The prompt, and the answer's tokens that the measure reads behind it."""
        return self.prompt.then(self.measure.more)


@dataclass(frozen=True)
class Site:
    """What one row replaces: of a job's prompt, in these blocks at these positions, one head."""

    job: Job
    blocks: tuple[int, ...]
    positions: tuple[int, ...]
    head: int | None = None


def prepare(
    model: TransformerBridge,
    pairs: Sequence[tuple[Prompt, Source]],
    targets: Sequence[Target | None],
    against: Sequence[str | Sequence[int] | None],
    at: str,
    batch_size: int,
) -> list[Job]:
    """Run prompts and sources once each, and keep their activations."""
    batch_size = whole("batch_size", batch_size, 1)
    prompts = [read_prompt(model, prompt, "prompt") for prompt, _ in pairs]
    require_landing(model, at, prompts[0])
    sources = [
        None
        if callable(source) or isinstance(source, Mean)
        else read_prompt(model, source, "source")
        for _, source in pairs
    ]
    measures: list[Measure | None] = []
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if target is None and against[i] is not None:
            raise ValueError("against needs a target to be compared with")
        if target is None and sources[i] is None:
            raise ValueError("target is needed where the source is no prompt")
        known = None if target is None else measure_of(model, prompt, target, against[i])
        measures.append(known)

    rows = [
        read.then(measure.more if measure else ())
        for own in (prompts, sources)
        for read, measure in zip(own, measures, strict=True)
        if read is not None
    ]
    kept = max(measure.kept if measure else 1 for measure in measures)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(row: int, values: Tensor, logits: Tensor) -> None:
        found[row] = values, logits.clone()

    activations(model, rows, at, keep, kept=kept, batch_size=batch_size)
    places = iter(range(len(prompts), len(rows)))
    jobs = []
    for i, (prompt, read, (_, source)) in enumerate(zip(prompts, sources, pairs, strict=True)):
        own, logits = found[i]
        own = own[:, : len(prompt)]
        first, goal = 0, float("nan")
        measure = measures[i]
        if read is not None:
            first, shift = counterparts(prompt, read)
            theirs, their_logits = found[next(places)]
            measure = measure or likeness(their_logits[-1])
            goal = float(measure.read(their_logits[None, -measure.kept :]))
            new = own.clone()
            new[:, first:] = theirs[:, first + shift : len(read)]
        elif isinstance(source, Mean):
            new = mean_values(model, source, at, len(prompt), batch_size).to(own)
        else:
            new = torch.stack([_replaced(source, block, row) for block, row in enumerate(own)])
        assert measure is not None
        plain = float(measure.read(logits[None, -measure.kept :]))
        jobs.append(Job(prompt, measure, own, new, first, plain, goal))
    return jobs


def sites_of(
    model: TransformerBridge,
    job: Job,
    at: str,
    blocks: Groups | None,
    positions: Positions | Span | None,
) -> tuple[list[Site], Patching]:
    """A job's sites row by row, and the result that their measures are to fill."""
    windows = block_groups(blocks, model.cfg.n_layers)
    groups = position_groups(job.prompt, positions, job.first)
    columns: list[tuple[tuple[int, ...], int | None]]
    if at == "z":
        everywhere = tuple(sorted({place for group in groups for place in group}))
        columns = [(everywhere, head) for head in range(model.cfg.n_heads)]
        places: list[tuple[int, ...]] = [(head,) for head in range(model.cfg.n_heads)]
        names = [f"head {head}" for head in range(model.cfg.n_heads)]
    else:
        columns = [(group, None) for group in groups]
        places = groups
        texts = token_texts(model, job.prompt.ids)
        names = ["".join(texts[place] for place in group) for group in groups]
    sites = [Site(job, window, *column) for window, column in product(windows, columns)]
    return sites, Patching(
        torch.zeros(len(windows), len(columns)),
        job.plain,
        job.goal,
        tuple(windows),
        tuple(places),
        tuple(names),
        ("block", "head" if at == "z" else "pos"),
        at,
        job.measure.name,
        "patching",
        model_fingerprint(model),
    )


def _replaced(source: Any, block: int, values: Tensor) -> Tensor:
    new = source(block, values)
    if not isinstance(new, Tensor) or new.shape != values.shape:
        got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"the source must return values of shape {list(values.shape)} for block {block}, "
            f"got {got}"
        )
    if not bool(new.isfinite().all()):
        raise ValueError(f"the source's values for block {block} are not finite")
    return new.to(values)
