"""Keys and queries of prompts as they are before the rotation, read without any edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lenskit.models import (
    HeadHooks,
    Tokens,
    applied_edits,
    fused_generation,
    hooked,
    paused,
    run_plain,
    using,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def without_edits(model: TransformerBridge, hooks: HeadHooks) -> Iterator[None]:
    """The model without the edits now applied, with fused attention where its hooks fire in it."""
    with using(model), paused(model):
        if hooks.obstacle or applied_edits(model):
            yield
            return
        with fused_generation(model):
            yield


@torch.no_grad()
def read_heads(
    model: TransformerBridge,
    hooks: HeadHooks,
    names: Sequence[str],
    tokens: Tokens,
    receive: Callable[[int, Float[Tensor, "row pos head d_head"]], None],
) -> None:
    """Run a batch as far as the last of ``names``, and give ``receive`` what each block holds."""
    read: set[str] = set()

    def reader(value: Tensor, hook: Any, name: str) -> None:
        receive(names.index(name), hooks.split(model, name, value))
        read.add(name)
        if name == names[-1]:
            # The logits, the largest tensor of a pass, are never wanted.
            raise StopAtLayerException(value)

    wanted = [(name, partial(reader, name=name)) for name in names]
    hf_model: Any = model.original_model
    with hooked(model, wanted), suppress(StopAtLayerException):
        run_plain(hf_model, tokens, use_cache=False)
    if missing := [name for name in names if name not in read]:
        raise RuntimeError(f"these hooks did not fire: {', '.join(missing)}; see check_model")
