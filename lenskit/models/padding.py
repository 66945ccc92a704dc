"""Prompts in one batch must not change each other: what is tried at load, and refused later.

A mask hides the padding from attention, but some models still choose by the length of the batch:
rotary embeddings whose factors switch (longrope, dynamic NTK), and sparse attention that picks so
many keys, padding among them. Up to the length at which they begin to, they are as any other
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lenskit.models.kv_cache import cache_of
from lenskit.models.reference import (
    EVERYTHING,
    Reference,
    attention_patterns,
    probe_tokens,
    run_plain,
)
from lenskit.models.templates import pad_left

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Longer probes would cost more than the rest of the check.
_LONGEST_PROBE = 600
_BEYOND = 8
# Lengths from which on attention looks at less than everything, which a mask may say rightly.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
# How far rounding may lead apart; half precision rounds otherwise in another batch, so that only
# the mean tells.
_LARGEST, _MEAN_IN_HALF = 1e-3, 2e-2


@dataclass(frozen=True)
class Limits:
    """Up to which length a model's results are those of the prompt alone.

    ``longest``: the most tokens of a prompt and its answer, ``None`` where there is no limit; more
    are refused. ``reason``: the entry of the config that sets it. ``untried``: windows too long to
    be tried at load. ``dependence``: in words, that already short prompts depend on their batch.
    """

    longest: int | None = None
    reason: str = ""
    untried: tuple[str, ...] = ()
    dependence: str = ""


_limits: WeakKeyDictionary[Any, Limits] = WeakKeyDictionary()


def limits_of(model: TransformerBridge) -> Limits:
    """What ``set_limits`` was given for this model."""
    return _limits.get(model, Limits())


def limits_by_config(config: PreTrainedConfig) -> Limits:
    """The limit that the config alone sets, nothing tried."""
    untried = tuple(f"{name} of {length}" for name, length in windows(config))
    return _shortest(dict(_switches(config)), untried)


def try_limits(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: Reference
) -> Limits:
    """Run the probes alone, without padding, and longer ones than the config's windows.

    ``hf_model`` must not have been wrapped; ``reference`` is its own reading of the same probes in
    one batch. Windows of more than 600 tokens are not tried, but believed; what is known to
    switch is a limit in any case.
    """
    ids = probe_tokens(tokenizer).input_ids[-1].tolist()
    found, untried = dict(_switches(hf_model.config)), []
    for name, length in windows(hf_model.config):
        if length > _LONGEST_PROBE:
            untried.append(f"{name} of {length}")
        elif _differs_beyond(hf_model, ids, length, tokenizer.pad_token_id):
            found[name] = length
    dependence = _dependence(hf_model, tokenizer, reference)
    return replace(_shortest(found, tuple(untried)), dependence=dependence)


def set_limits(model: TransformerBridge, limits: Limits) -> None:
    """From now on refuse, with a ``ValueError``, batches of more tokens than the limit."""
    _limits[model] = limits
    longest = limits.longest
    if longest is None:
        return

    def refuse(module: Any, arguments: tuple, options: Mapping[str, Any]) -> None:
        ids = options.get("input_ids", arguments[0] if arguments else None)
        earlier = cache_of(options)
        length = 0 if ids is None else ids.shape[-1]
        length += getattr(earlier, "get_seq_length", int)()
        if length > longest:
            raise ValueError(
                f"{length} tokens are too many: beyond {longest} ({limits.reason}) this model's "
                "results depend on the length of the batch, so that prompts change each other; "
                "use shorter prompts and answers"
            )

    model.original_model.register_forward_pre_hook(refuse, with_kwargs=True)


def _switches(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """What in the config is known to change with the batch's length, and from which on."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in [ropes, *ropes.values()]:
        kind = str(rope.get("rope_type", "")) if isinstance(rope, Mapping) else ""
        if "dynamic" in kind:
            yield f"rope_type {kind}", int(text.max_position_embeddings)
        elif kind == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            length = rope.get("original_max_position_embeddings", own)
            yield f"rope_type {kind}", int(length or text.max_position_embeddings)
    keys = getattr(text, "index_topk", None)
    if isinstance(keys, int):
        yield "index_topk", keys


def windows(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """The entries of the config that hide tokens from attention which are so far away."""
    for name in _WINDOWS:
        length = getattr(config.get_text_config(), name, None)
        if isinstance(length, int) and length > 0:
            yield name, length


def _shortest(lengths: Mapping[str, int], untried: tuple[str, ...]) -> Limits:
    if not lengths:
        return Limits(untried=untried)
    reason = min(lengths, key=lambda name: lengths[name])
    return Limits(lengths[reason], reason, untried)


def _dependence(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: Reference
) -> str:
    """How a short prompt alone differs from the same in a batch; empty where it does not."""
    tokens = probe_tokens(tokenizer)
    for row, length in enumerate(tokens.lengths.tolist()):
        output = run_plain(hf_model, tokens.rows([row]).trimmed(), **EVERYTHING)
        pairs = [
            *zip(attention_patterns(hf_model, output), reference.patterns, strict=True),
            *zip(output.hidden_states, reference.hidden_states, strict=True),
        ]
        for alone, together in pairs:
            real = together[row : row + 1, ..., -length:, :]
            real = real[..., -alone.shape[-1] :]
            if _apart(alone, real):
                return (
                    f"what it makes of a prompt of {length} tokens depends on the prompts beside "
                    f"it, although padding is masked{_because(hf_model)}"
                )
    return ""


def _because(hf_model: PreTrainedModel) -> str:
    switches = [f"{name}, from {length} tokens on" for name, length in _switches(hf_model.config)]
    return f" ({'; '.join(switches)})" if switches else ""


def _differs_beyond(hf_model: PreTrainedModel, ids: list[int], limit: int, pad: int) -> bool:
    """Whether prompts of different lengths, two beyond the limit, change each other in a batch."""
    text = ids * (1 + (limit + _BEYOND) // len(ids))
    prompts = [text[-length:] for length in (limit + _BEYOND, limit + 2, max(2, limit // 2))]
    together = _last_state(hf_model, prompts, pad)
    alone = [_last_state(hf_model, [prompt], pad)[0] for prompt in prompts]
    return any(_apart(one, other) for one, other in zip(alone, together, strict=True))


def _last_state(hf_model: PreTrainedModel, prompts: list[list[int]], pad: int) -> Tensor:
    """What the model returns at the last token, before the logits where they come apart."""
    output = run_plain(hf_model.base_model, pad_left(prompts, pad), use_cache=False)
    values = output[0] if "logits" not in output else output.logits
    return values[:, -1]


def _apart(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the values differ by more than rounding."""
    half = ours.dtype in (torch.float16, torch.bfloat16)
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    if not bool(ours.isfinite().all()):
        return False  # another check's business
    difference = (ours - theirs).abs() / ours.abs().max().clamp(min=1e-30)
    found = difference.mean() if half else difference.max()
    return not bool(found <= (_MEAN_IN_HALF if half else _LARGEST))
