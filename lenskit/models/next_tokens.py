"""The token after each of many prompts; what a batch begins with alike is run once for all."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

from lenskit.models.fused import state_of
from lenskit.models.padding import windows
from lenskit.models.reference import run_plain
from lenskit.models.starts import Start, common_start, left_aligned, probes, worth_sharing
from lenskit.models.templates import Tokens, position_ids
from lenskit.models.use import has_hooks, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_verdicts: WeakKeyDictionary[Any, dict[tuple, bool]] = WeakKeyDictionary()


@torch.no_grad()
def next_logits(model: TransformerBridge, tokens: Tokens) -> Float[Tensor, "prompt vocab"]:
    """The logits of the token after each left-padded prompt, of one batch, on the model's device.

    What the prompts begin with alike is run once where a trial of the model (once for each dtype
    and device) gives the logits of the plain pass, no prompt is longer than its attention sees, and
    no hooks are set on it.
    """
    tokens = tokens.trimmed().to(model.cfg.device)
    with using(model):
        number = worth_sharing(left_aligned(tokens), int(tokens.lengths.min()) - 1)
        sight = min((n for _, n in windows(model.original_model.config)), default=math.inf)
        if number and tokens.input_ids.shape[1] < sight and _shares(model):
            return _shared(model, tokens, number)
        return _plain(model, tokens)


def _plain(model: TransformerBridge, tokens: Tokens) -> Tensor:
    options = _last(model) | {"use_cache": False}
    return run_plain(model.original_model, tokens, **options).logits[:, -1]


def _shared(model: TransformerBridge, tokens: Tokens, number: int) -> Tensor:
    """The same with the first ``number`` tokens of all prompts run for one of them."""
    hf_model: Any = model.original_model
    start = Start()
    hf_model(input_ids=left_aligned(tokens)[:1, :number], past_key_values=start, use_cache=True)
    if start.get_seq_length() != number:
        raise ValueError("the model keeps no keys and values of what prompts begin with")
    start.complete = True
    # A prompt that is padded has some of what all begin with in the columns that are left.
    columns = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    padding = (tokens.attention_mask == 0).sum(dim=1, keepdim=True)
    mask = tokens.attention_mask * (columns >= padding + number)
    mask[:, :number] = 1
    options = _last(model)
    if accepts_mask_derived_position_ids(hf_model):
        options["position_ids"] = position_ids(mask)[:, number:]
    rest = tokens.input_ids[:, number:]
    output = hf_model(
        input_ids=rest, attention_mask=mask, past_key_values=start, use_cache=True, **options
    )
    return output.logits[:, -1]


def _last(model: TransformerBridge) -> dict[str, Any]:
    """What lets a model compute the last token's logits alone, if it can."""
    known = inspect.signature(model.original_model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _shares(model: TransformerBridge) -> bool:
    if has_hooks(model):
        return False
    known = _verdicts.setdefault(model, {})
    if state_of(model) not in known:
        known[state_of(model)] = _try(model)
    return known[state_of(model)]


def _try(model: TransformerBridge) -> bool:
    tokens = probes(model.tokenizer).to(model.cfg.device)
    number = common_start(left_aligned(tokens), int(tokens.lengths.min()) - 1)
    half = state_of(model)[0] in (torch.float16, torch.bfloat16)
    exact = _plain(model, tokens).float()
    try:
        found = _shared(model, tokens, number).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Whatever goes wrong in a model that nobody has foreseen, the plain pass remains.
        return False
    difference = float((found - exact).abs().max() / exact.abs().max())
    return difference <= (0.1 if half else 1e-4)
