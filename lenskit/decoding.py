"""Token after token behind left-padded prompts: cached passes, the choice of a token, the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

from lenskit._arguments import whole
from lenskit._progress import Bars
from lenskit.models import (
    Edit,
    Tokens,
    fused_generation,
    position_ids,
    require_positions,
    rows_of,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    Choose = Callable[[Float[Tensor, "row vocab"], Int[Tensor, "row"], int], Int[Tensor, "row"]]

# Rows that have ended are dropped once they are this share of the batch.
_SPARE = 0.25


class Passes(Protocol):
    """One forward pass after the other over a batch, each behind the tokens of those before."""

    def __call__(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row key"],
        positions: Int[Tensor, "row pos"],
    ) -> Float[Tensor, "row vocab"]:
        """The logits behind each row's last token."""

    def keep(self, rows: Int[Tensor, "row"]) -> bool:
        """Go on with these rows alone; False where that cannot be done, and nothing was."""


class CachedPasses:
    """The model's own passes, with its key-value cache."""

    def __init__(self, model: TransformerBridge) -> None:
        self._hf_model: Any = model.original_model
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(self._hf_model.forward).parameters:
            self._options["logits_to_keep"] = 1
        self._own_positions = accepts_mask_derived_position_ids(self._hf_model)
        self.cache: Any = None

    def __call__(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row key"],
        positions: Int[Tensor, "row pos"],
    ) -> Float[Tensor, "row vocab"]:
        """The logits behind each row's last token; raises ValueError for a model without cache."""
        options = dict(self._options)
        if self._own_positions:
            options["position_ids"] = positions
        if self.cache is not None:
            options["past_key_values"] = self.cache
        elif mask.shape[1] > ids.shape[1]:
            name = type(self._hf_model).__name__
            raise ValueError(f"{name} keeps no key-value cache to decode with")
        output = self._hf_model(input_ids=ids, attention_mask=mask, **options)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def keep(self, rows: Int[Tensor, "row"]) -> bool:
        """Drop the other rows from the cache, where it can be done."""
        if not hasattr(self.cache, "batch_select_indices"):
            return False
        # On the CPU: the blocks of a model spread over GPUs keep their caches on several.
        self.cache.batch_select_indices(rows.cpu())
        return True


def end_tokens(model: TransformerBridge) -> tuple[int, ...]:
    """Ids at which an answer ends: those of the generation config, and a tokenizer's own."""
    settings = getattr(model.original_model, "generation_config", None)
    configured = getattr(settings, "eos_token_id", None)
    found = configured if isinstance(configured, list | tuple) else [configured]
    # A model whose tokens are not text may have no tokenizer.
    own = getattr(model.tokenizer, "eos_token_id", None)
    ids = {*found, own} - {None}
    return tuple(sorted(int(token) for token in ids))


@torch.no_grad()
def decode(
    model: TransformerBridge,
    prompts: Tokens,
    max_new_tokens: int,
    choose: Choose,
    edits: Sequence[Edit],
    passes: Passes,
) -> list[list[int]]:
    """Token ids written for each prompt, up to and with its end token.

    ``choose`` gets the logits, the numbers of the rows that are still there, and the step.
    """
    device = next(model.original_model.parameters()).device
    prompts = prompts.to(device)
    rows, width = prompts.input_ids.shape
    ends = torch.tensor(end_tokens(model), device=device, dtype=torch.long)
    mask = torch.cat(
        [prompts.attention_mask, prompts.attention_mask.new_ones(rows, max_new_tokens)], dim=1
    )
    positions = position_ids(mask)
    written = torch.full((rows, max_new_tokens), -1, device=device)
    live = torch.arange(rows, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    chunk, seen = prompts.input_ids, 0
    for step in range(max_new_tokens):
        total = width + step
        logits = passes(chunk, mask[:, :total], positions[:, seen:total])
        chosen = choose(logits, live, step)
        written[live, step] = torch.where(running, chosen, -1)
        running &= ~torch.isin(chosen, ends)
        left = int(running.sum())
        if left == 0:
            break
        kept = running.nonzero()[:, 0]
        if left <= (1 - _SPARE) * len(running) and passes.keep(kept):
            mask, positions, live = mask[kept], positions[kept], live[kept]
            chosen, running = chosen[kept], running[kept]
            for each in edits:
                each.keep(kept)
        chunk, seen = chosen[:, None], total
    return [[token for token in ids if token >= 0] for ids in written.tolist()]


def greedy(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, "row"]:
    """The most probable tokens; raises ValueError for logits that are not numbers."""
    best = logits.argmax(dim=-1, keepdim=True)
    # The greatest of a row that holds a NaN is that NaN.
    if bool(logits.gather(1, best).isnan().any()):
        raise ValueError(
            f"the model's logits are not numbers in {logits.dtype}; "
            "a smaller coefficient or another dtype may help"
        )
    return best[:, 0]


def chooser(temperature: float | None, uniform: Float[Tensor, "row token"] | None) -> Choose:
    """The next tokens from the logits of the rows ``live``: the greatest, or sampled."""

    def choose(logits: Tensor, live: Tensor, step: int) -> Tensor:
        best = greedy(logits)
        if temperature is None or uniform is None:
            return best
        summed = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
        draw = uniform[live.cpu(), step, None].to(summed.device) * summed[:, -1:]
        return torch.searchsorted(summed, draw, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    return choose


def uniform_draws(rows: int, tokens: int, seed: int) -> Float[Tensor, "row token"]:
    """Draws that depend on the seed and on the row's number alone."""
    draws = [np.random.default_rng((seed, row)).random(tokens) for row in range(rows)]
    return torch.from_numpy(np.stack(draws)).float()


def checked_options(
    *, max_new_tokens: int, batch_size: int, temperature: float | None, seed: int
) -> tuple[int, int, int]:
    """``max_new_tokens``, ``batch_size`` and ``seed``; ValueError where one cannot be meant."""
    found = whole("max_new_tokens", max_new_tokens, 0), whole("batch_size", batch_size, 1)
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, or None for greedy; got {temperature}")
    return *found, whole("seed", seed, 0)


def written_in_batches(
    model: TransformerBridge,
    tokens: Tokens,
    passes: Callable[[Int[Tensor, "row"]], Passes],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """The ids written behind each prompt, up to and with its end token.

    Batched by length, those that do not fit into memory halved; the options are ``generate``'s.
    """
    max_new_tokens, batch_size, seed = checked_options(
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed
    )
    require_positions(model, tokens, more=max_new_tokens)
    drawn = None if temperature is None else uniform_draws(len(tokens), max_new_tokens, seed)
    written: list[list[int]] = [[] for _ in range(len(tokens))]

    with (
        rows_of(model, len(tokens), "questions") as edits,
        fused_generation(model),
        Bars(disable=not progress) as bar,
    ):
        task = bar.add_task("generate", total=len(tokens))
        pending = list(tokens.lengths.argsort(stable=True).split(batch_size)) * (max_new_tokens > 0)
        while pending:
            rows = pending.pop(0)
            for each in edits:
                each.batch(rows)
            choose = chooser(temperature, None if drawn is None else drawn[rows])
            batch = tokens.rows(rows).trimmed()
            try:
                answers = decode(model, batch, max_new_tokens, choose, edits, passes(rows))
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                pending[:0] = rows.split((len(rows) + 1) // 2)
                continue
            for row, ids in zip(rows.tolist(), answers, strict=True):
                written[row] = ids
            bar.advance(task, len(rows))
    return written
