"""One pass over the prompts: attention from the candidate tokens, and the residual stream there.

Only the last ``K`` rows (the candidate tokens) of each tensor are kept, so memory grows with the
prompts and never with their squared length. Where the model allows it, it runs fused attention
meanwhile (``lenskit.fused``); everywhere else the rows are read by hooks, from eager attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lenskit._arguments import block_numbers, whole
from lenskit._display import Displayed, count, quoted
from lenskit.models import (
    PATTERN,
    RESID,
    Arrivals,
    Tokens,
    fused,
    hooked,
    in_batches,
    model_fingerprint,
    using,
)
from lenskit.prompts import PromptSet, row_index

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Visit = Callable[
    [
        int,
        Int[Tensor, " prompt"],
        Float[Tensor, "prompt head candidate key"],
        Bool[Tensor, "prompt key"],
    ],
    None,
]

Receive = Callable[[int, Tensor], None]
Attention = Literal["auto", "eager", "fused"]


@dataclass(frozen=True, repr=False)
class Capture(Displayed):
    """What one pass over the prompts leaves, on the CPU in float32.

    ``attention_to_prefix``: attention mass from each candidate token to the prefix, summed over
    the prefix tokens; 0 for prompts without a prefix. ``resid_post``: the residual stream after
    each block at the candidate tokens. ``model``: its fingerprint.
    """

    prompts: PromptSet
    attention_to_prefix: Float[Tensor, "prompt layer head candidate"]
    resid_post: Float[Tensor, "prompt layer candidate d_model"]
    model: str

    def __len__(self) -> int:
        return len(self.prompts)

    def _headline(self) -> str:
        return f"Capture of {self.prompts.concept.name!r}, {count(len(self), 'prompt')}"

    def _rows(self) -> dict[str, object]:
        mean = self.attention_to_prefix[self.prompts.has_prefix].mean(dim=(0, 1, 2)).tolist()
        by_token = enumerate(mean, start=-len(mean))
        memory = self.attention_to_prefix.nbytes + self.resid_post.nbytes
        return super()._rows() | {
            "candidates": quoted(self.candidates),
            "mean attention": ", ".join(f"token {i}: {mass:.3g}" for i, mass in by_token),
            "memory": f"{memory / 2**20:,.1f} MiB",
        }

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidate tokens in text order; the last one is token -1."""
        return self.prompts.candidates

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.resid_post.shape[1]

    def rows(self, index: Int[Tensor, " row"] | Bool[Tensor, " prompt"] | Sequence[int]) -> Capture:
        """The capture of some of the prompts, in the order of ``index`` (a mask keeps theirs)."""
        rows = row_index(index, len(self))
        return Capture(
            self.prompts.rows(rows),
            self.attention_to_prefix[rows],
            self.resid_post[rows],
            self.model,
        )


def capture(
    model: TransformerBridge,
    prompts: PromptSet,
    *,
    batch_size: int = 64,
    attention: Attention = "auto",
    progress: bool = True,
) -> Capture:
    """Read attention to the prefix and ``resid_post`` at the candidate tokens, in one pass.

    Neither depends on ``batch_size``, on padding or on the order of the prompts, up to rounding.
    The unembedding is never run. On out-of-memory the batch is halved and the pass goes on. With
    fused attention, what the prompts of a batch begin with alike is run once for all of them.

    ``attention="auto"`` runs fused attention where a trial (once for each model) gives the rows
    of eager attention: to 1e-5 in float32, to rounding in half precision. It takes the eager pass
    for other models, and while other hooks are set. ``"eager"`` and ``"fused"`` insist on one.

    The model is held for the thread meanwhile: what other threads capture, steer or have answered
    waits (see ``lenskit.models.use``).

    Raises ``ValueError`` naming the block where a value is not finite, and for
    ``attention="fused"`` where it cannot be had.

    >>> capture = lk.capture(model, prompts, progress=False)
    >>> capture.layers == model.cfg.n_layers, capture.candidates == prompts.candidates
    (True, True)
    """
    batch_size = whole("batch_size", batch_size, 1)
    candidates, cfg = len(prompts.candidates), model.cfg
    blocks = range(cfg.n_layers)
    masses = torch.zeros(len(prompts), cfg.n_layers, cfg.n_heads, candidates)
    resid = torch.zeros(len(prompts), cfg.n_layers, candidates, cfg.d_model)

    def store(rows: Tensor, layer: int, mass: Tensor, state: Tensor) -> None:
        masses[rows, layer] = _finite(mass, "attention", layer)
        resid[rows, layer] = _finite(state, "resid_post", layer)

    arrivals = Arrivals(store)

    def run(rows: Tensor) -> None:
        tokens = prompts.tokens.rows(rows).trimmed().to(cfg.device)
        width = tokens.input_ids.shape[1]
        prefix = prompts.prefix_mask[rows, -width:].to(cfg.device, torch.float32)
        found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

        def attend(layer: int, pattern: Tensor) -> None:
            keys = prefix.to(pattern.device)
            found[0][layer] = arrivals.send(torch.einsum("phcj,pj->phc", pattern.float(), keys))

        def keep(layer: int, state: Tensor) -> None:
            found[1][layer] = arrivals.send(state.to(torch.float32, copy=True))

        _forward(model, tokens, candidates, blocks, attention, pattern=attend, state=keep)
        arrivals.add(rows, *found)

    with using(model):
        in_batches(prompts.tokens, batch_size, run, progress=progress, description="Capturing")
    arrivals.settle()
    return Capture(prompts, masses, resid, model_fingerprint(model))


def for_each_pattern(
    model: TransformerBridge,
    tokens: Tokens,
    number_of_candidates: int,
    visit: Visit,
    *,
    batch_size: int = 64,
    attention: Attention = "auto",
    progress: bool = True,
    blocks: Sequence[int] | None = None,
) -> None:
    """Hand ``visit`` the attention rows of the last tokens, block by block and batch by batch.

    ``visit(layer, rows, pattern, attention_mask)`` gets the block, the indices of the batch's
    prompts in ``tokens`` (CPU), the pattern ``[prompt, head, candidate, key]`` after the softmax
    (on the model's device, in its dtype or float32; valid only during the call) and which keys
    are real (same device). Keys are right-aligned: the batch's key axis is the last ``key``
    columns of ``tokens``, with the padding that all of its prompts share cut off.
    ``attention`` as in ``capture``.

    Batches are formed by length. After out-of-memory a batch is run again in halves, so ``visit``
    may see the same block and rows twice: let it assign by row, not accumulate.
    """
    wanted = sorted(block_numbers("blocks", blocks, model.cfg.n_layers))
    batch_size = whole("batch_size", batch_size, 1)
    shortest = int(tokens.lengths.min())
    try:
        candidates = whole("number_of_candidates", number_of_candidates, 1, shortest)
    except ValueError as error:
        raise ValueError(f"{error} (the shortest prompt has {shortest} tokens)") from None

    def run(rows: Tensor) -> None:
        batch = tokens.rows(rows).trimmed().to(model.cfg.device)
        mask = batch.attention_mask.bool()

        def receive(layer: int, pattern: Tensor) -> None:
            visit(layer, rows, pattern, mask.to(pattern.device))

        _forward(model, batch, candidates, wanted, attention, pattern=receive)

    with using(model):
        in_batches(tokens, batch_size, run, progress=progress, description="Reading attention")


def _forward(
    model: TransformerBridge,
    tokens: Tokens,
    candidates: int,
    blocks: Sequence[int],
    attention: Attention,
    *,
    pattern: Receive | None = None,
    state: Receive | None = None,
) -> None:
    """Run one batch and hand on the candidate rows of each block's pattern and ``resid_post``.

    This is the only place that knows where the rows come from. The model is stopped at the last
    block wanted, so that the logits, the largest tensor of a forward pass, are never computed.
    """
    if attention not in get_args(Attention):
        raise ValueError(
            f"attention must be one of {', '.join(get_args(Attention))}; got {attention!r}"
        )
    if attention != "eager":
        if not (why := fused.obstacle(model, _eager)):
            try:
                fused.forward(model, tokens, candidates, blocks, pattern=pattern, state=state)
                return
            except fused.Unsupported as error:
                why = str(error)
        if attention == "fused":
            raise ValueError(f"attention='fused' cannot be had: {why}; use 'auto'")
    _eager(model, tokens, candidates, blocks, pattern=pattern, state=state)


def _eager(
    model: TransformerBridge,
    tokens: Tokens,
    candidates: int,
    blocks: Sequence[int],
    *,
    pattern: Receive | None = None,
    state: Receive | None = None,
) -> None:
    """``_forward`` from eager attention, whose whole pattern the bridge's hooks hand on."""
    read: set[str] = set()

    def reader(name: str, layer: int, receive: Receive, axis: int) -> Callable[..., None]:
        def read_rows(value: Tensor, hook: Any) -> None:
            receive(layer, value.narrow(axis, value.shape[axis] - candidates, candidates))
            read.add(name)
            if name == names[-1]:
                raise StopAtLayerException(value)

        return read_rows

    hooks = []
    for layer in blocks:
        if pattern is not None:
            name = f"blocks.{layer}.{PATTERN}"
            hooks.append((name, reader(name, layer, pattern, -2)))
        if state is not None:
            name = f"blocks.{layer}.{RESID}"
            hooks.append((name, reader(name, layer, state, 1)))
    names = [name for name, _ in hooks]
    with torch.no_grad(), hooked(model, hooks):
        model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    if missing := [name for name in names if name not in read]:
        raise RuntimeError(f"these hooks did not fire: {', '.join(missing)}; see check_model")


def _finite(values: Tensor, name: str, layer: int) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{name} of block {layer} is not finite; load the model in another dtype "
            "(dtype='float32' or 'bfloat16')"
        )
    return values
