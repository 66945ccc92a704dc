"""Exact activation patching: every site in a row of its own (Meng et al., arXiv 2202.05262)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenskit.attention import Span
from lenskit.causal.jobs import Job, Site, prepare, sites_of
from lenskit.causal.measures import Target
from lenskit.causal.prompts import Groups, Positions, Prompt
from lenskit.causal.results import Patching
from lenskit.causal.runs import At, by_head, hook_name, last_logits, padded, shifts
from lenskit.causal.sources import Source
from lenskit.models import in_batches, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def patch(
    model: TransformerBridge,
    prompt: Prompt,
    source: Source,
    *,
    target: Target | None = None,
    against: str | Sequence[int] | None = None,
    at: At = "resid_post",
    blocks: Groups | None = None,
    positions: Positions | Span | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Patching:
    """Run ``prompt`` with one site after the other replaced by ``source``, all in batches.

    ``prompt``: a user's message, a conversation, or token ids as they are. ``source``: another
    prompt, whose activations at the same block and position are put in (the clean one to see what
    restores an answer, the corrupt one to see what it needs: resample ablation; either may be
    ``Noised``); ``Mean`` and ``Noise``; or a function ``(block, values) -> values`` of the
    prompt's own activations ``[pos, d_model]`` (``[pos, head, d_head]`` for heads).

    ``target``: an answer (text or token ids), measured by its log-probability in nats, summed over
    its tokens; with ``against``, another answer, by ``logit(target) - logit(against)`` where they
    first differ; or a function of the next token's logits ``[row, vocab] -> [row]``. Without one:
    minus the Kullback-Leibler divergence from the source prompt's next token.

    ``at``: ``resid_pre``, ``resid_post``, ``attn_out``, ``mlp_out``, or ``z``, each head's output
    before the output projection, which gives [block, head], a head being patched at all
    ``positions`` at once. ``blocks`` and ``positions``: by default each alone; an entry that is a
    list, or an ``lk.span`` of this prompt, is patched as one. Negative positions count from the
    end.
    Prompts of different lengths are compared over the tokens that both end with.

    The model is held for the thread meanwhile. Inside ``steer`` the steered model is patched.
    Costs a forward pass for each row, as many as there are sites.

    Raises ``ValueError`` for targets, blocks and positions that cannot be meant, and
    ``ModelCheckError`` where edits of this kind do not change the model's logits.

    >>> clean, corrupt = "What do you fear?", "What do you like?"
    >>> found = lk.causal.patch(model, corrupt, clean, target="spiders", blocks=[0, 3])
    >>> found.axes, len(found.names) == found.values.shape[1]
    (('block', 'pos'), True)
    """
    options: dict[str, Any] = {"blocks": blocks, "positions": positions, "progress": progress}
    with using(model):
        jobs = prepare(model, [(prompt, source)], [target], [against], at, batch_size)
        return patched(model, jobs, at, batch_size=batch_size, **options)[0]


def patch_pairs(
    model: TransformerBridge,
    pairs: Sequence[tuple[Prompt, Source]],
    *,
    targets: Sequence[Target | None] | None = None,
    against: Sequence[str | Sequence[int] | None] | None = None,
    at: At = "resid_post",
    blocks: Groups | None = None,
    positions: Positions | Span | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Patching]:
    """``patch`` for several pairs (prompt, source), whose sites share batches.

    ``targets`` and ``against``: one for each pair, or None for all. The rest is that of ``patch``;
    each result equals that of its pair alone.

    >>> pairs = [("What do you like?", "What do you fear?"), ("Who are you?", "Who am I?")]
    >>> len(lk.causal.patch_pairs(model, pairs, blocks=[3], positions=[-1]))
    2
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("pairs is empty; give at least one (prompt, source)")
    given: dict[str, Any] = {"targets": targets, "against": against}
    known: dict[str, list[Any]] = {
        name: [None] * len(pairs) if own is None else list(own) for name, own in given.items()
    }
    for name, own in known.items():
        if len(own) != len(pairs):
            raise ValueError(f"{name} must be one for each of {len(pairs)} pairs, got {len(own)}")
    options: dict[str, Any] = {"blocks": blocks, "positions": positions, "progress": progress}
    with using(model):
        jobs = prepare(model, pairs, known["targets"], known["against"], at, batch_size)
        return patched(model, jobs, at, batch_size=batch_size, **options)


def patched(
    model: TransformerBridge,
    jobs: Sequence[Job],
    at: str,
    *,
    blocks: Groups | None,
    positions: Positions | Span | None,
    batch_size: int,
    progress: bool,
) -> list[Patching]:
    """Run every site of every job, and fill their results."""
    planned = [sites_of(model, job, at, blocks, positions) for job in jobs]
    sites = [site for own, _ in planned for site in own]
    numbers = [number for number, (own, _) in enumerate(planned) for _ in own]
    tokens = padded(model, [job.row for job in jobs]).rows(numbers)
    measured = torch.zeros(len(sites))

    def run(rows: Tensor) -> None:
        batch = [sites[row] for row in rows.tolist()]
        kept = max(site.job.measure.kept for site in batch)
        some = tokens.rows(rows).trimmed()
        width = some.input_ids.shape[1]
        hooks = shifts([site.job.row for site in batch], width) + edits(model, batch, at, width)
        logits = last_logits(model, some, kept, hooks)
        for measure in {id(site.job): site.job.measure for site in batch}.values():
            own = [i for i, site in enumerate(batch) if site.job.measure is measure]
            measured[rows[own]] = measure.read(logits[own, -measure.kept :]).float().cpu()

    in_batches(tokens, batch_size, run, progress=progress, description="Patching")
    results = []
    for own, result in planned:
        result.values.copy_(measured[: len(own)].view_as(result.values))
        measured = measured[len(own) :]
        results.append(result)
    return results


def edits(
    model: TransformerBridge, batch: Sequence[Site], at: str, width: int
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that replace the site of each row of a left-padded batch of ``width`` columns."""
    by_block: dict[int, list[tuple[list[int], list[int], list[int], Tensor]]] = {}
    for row, site in enumerate(batch):
        start, number = width - len(site.job.row), len(site.positions)
        columns = [start + place for place in site.positions]
        heads = [] if site.head is None else [site.head] * number
        for block in site.blocks:
            new = site.job.new[block, list(site.positions)]
            new = new if site.head is None else new[:, site.head]
            by_block.setdefault(block, []).append(([row] * number, columns, heads, new))

    def replacer(entries: Sequence[tuple[list[int], list[int], list[int], Tensor]]) -> Any:
        # One assignment for a block, however many rows it has.
        lists: Mapping[int, list[int]] = {
            axis: [place for entry in entries for place in entry[axis]] for axis in range(3)
        }
        index = tuple(torch.tensor(places) for places in lists.values() if places)
        new = torch.cat([entry[3] for entry in entries])

        def replace(value: Tensor, hook: Any) -> Tensor:
            # Never in place: the stream may be what another hook has kept.
            changed = by_head(model, at, value.clone())
            changed[tuple(places.to(value.device) for places in index)] = new.to(value)
            return changed.reshape(value.shape)

        return replace

    return [(hook_name(block, at), replacer(entries)) for block, entries in by_block.items()]
