"""Attribution patching: patching to first order, from one gradient (arXiv 2310.10348)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit.attention import Span
from lenskit.causal.jobs import Job, prepare, sites_of
from lenskit.causal.measures import Target
from lenskit.causal.prompts import Groups, Positions, Prompt
from lenskit.causal.results import Patching
from lenskit.causal.runs import At, by_head, hook_name, padded, shifts
from lenskit.causal.sources import Source
from lenskit.models import hooked, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def attribute(
    model: TransformerBridge,
    prompt: Prompt,
    source: Source,
    *,
    target: Target | None = None,
    against: str | Sequence[int] | None = None,
    at: At = "resid_post",
    blocks: Groups | None = None,
    positions: Positions | Span | None = None,
    steps: int = 1,
) -> Patching:
    """What ``patch`` would find, to first order: ``(new - own) · ∂ measure / ∂ own`` at each site.

    One forward and one backward pass whatever the number of sites, so it is the cheap first look;
    ``agreement`` says how good it is. It is poor where the measure is far from linear, above all
    for the residual stream of early blocks. With ``steps`` the gradient is averaged over so many
    prompts whose embeddings lie between ``prompt`` (0) and ``source`` (1), at ``(k + ½)/steps``
    (integrated gradients, arXiv 2403.17806): usually closer, for as many rows; it needs a source
    prompt of the same length.

    The arguments are those of ``patch``; each row is one block. Raises what ``patch`` raises.

    >>> clean, corrupt = "What do you fear?", "What do you like?"
    >>> found = lk.causal.attribute(model, corrupt, clean, target="spiders", at="attn_out")
    >>> found.method, found.values.shape[0] == model.cfg.n_layers
    ('attribution', True)
    """
    steps = whole("steps", steps, 1)
    with using(model):
        job = prepare(model, [(prompt, source)], [target], [against], at, 1)[0]
        sites, result = sites_of(model, job, at, blocks, positions)
        if any(len(window) > 1 for window in result.blocks):
            raise ValueError("blocks must be single blocks; windows are for exact patching")
        between = None
        if steps > 1:
            if callable(source) or job.goal != job.goal or job.first:
                raise ValueError("steps > 1 needs a source prompt of the same length")
            start = prepare(model, [(prompt, source)], [target], [against], "resid_pre", 1)[0]
            shares = (torch.arange(steps, device=start.own.device) + 0.5) / steps
            between = shares[:, None, None] * (start.new - start.own)[:1].float()
        gradient = _gradient(model, job, at, between)
    first_order = (job.new.float() - job.own.float()) * gradient
    by_place = first_order.flatten(2).sum(-1) if at != "z" else first_order.sum(-1)
    for i, site in enumerate(sites):
        own = by_place[site.blocks[0], list(site.positions)]
        own = own if site.head is None else own[:, site.head]
        result.values.view(-1)[i] = job.plain + float(own.sum())
    return replace(result, method="attribution")


@torch.enable_grad()
def _gradient(
    model: TransformerBridge, job: Job, at: str, between: Float[Tensor, "step pos d_model"] | None
) -> Float[Tensor, "block pos *width"]:
    """The measure's gradient at every site, the mean over rows with shifted embeddings."""
    rows = 1 if between is None else len(between)
    length = len(job.prompt)
    zeros: dict[int, Tensor] = {}

    def probe(block: int) -> Callable[..., Tensor]:
        def add_zero(value: Tensor, hook: Any) -> Tensor:
            # The gradient of what adds nothing is that of the activations.
            zeros[block] = torch.zeros_like(by_head(model, at, value), requires_grad=True)
            return value + zeros[block].view(value.shape)

        return add_zero

    def move(value: Tensor, hook: Any) -> Tensor:
        assert between is not None
        more = value.new_zeros(rows, value.shape[1] - length, value.shape[2])
        return value + torch.cat([between.to(value), more], dim=1)

    batch = [job.row] * rows
    hooks: list[tuple[str, Callable[..., Tensor]]] = shifts(batch, len(job.row))
    if between is not None:
        hooks.append((hook_name(0, "resid_pre"), move))
    hooks += [(hook_name(block, at), probe(block)) for block in range(model.cfg.n_layers)]
    tokens = padded(model, batch).to(model.cfg.device)
    with hooked(model, hooks):
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
        measured = job.measure.read(logits[:, -job.measure.kept :].float()).sum()
    found = torch.autograd.grad(measured, [zeros[block] for block in sorted(zeros)])
    return torch.stack([each.float().sum(0)[:length].to(job.own.device) for each in found]) / rows
