"""Generation with fused attention: every block runs its own attention, edits of scores included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

from lenskit.models.active import applied_edits, is_edit, paused
from lenskit.models.check import RESID, SCORES, model_report, probe_tokens
from lenskit.models.edited import NAME, Kept, Scores, Site, editing
from lenskit.models.fused import replace_attention, state_of
from lenskit.models.templates import position_ids
from lenskit.models.use import hooked, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Hooks that fire as ever while a block runs its own attention.
_RESIDUAL = ("hook_resid_pre", RESID)
_STEPS = 3
_obstacles: WeakKeyDictionary[Any, dict[tuple, str]] = WeakKeyDictionary()


@contextmanager
def fused_generation(model: TransformerBridge) -> Iterator[bool]:
    """Where the model allows it, run its blocks' own attention with the edits now applied.

    Yields whether it does. It does not where hooks of others are set inside attention, nor where a
    trial (once for each dtype and device) of prompts with cached steps, with and without an edit
    of the scores, is not what eager attention gives.
    """
    if obstacle(model):
        yield False
        return
    with _fused(model):
        yield True


def obstacle(model: TransformerBridge) -> str:
    """Why generation must not use fused attention now, in words; empty where it may."""
    for edit in applied_edits(model):
        if why := getattr(edit, "obstacle", ""):
            return why
    residual = {
        id(model.hook_dict[name])
        for block in range(model.cfg.n_layers)
        for kind in _RESIDUAL
        if (name := f"blocks.{block}.{kind}") in model.hook_dict
    }
    points = {id(point): point for point in model.hook_dict.values()}
    foreign = {
        key: point.name
        for key, point in points.items()
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
        if not is_edit(handle)
    }
    inside = [name for key, name in foreign.items() if key not in residual]
    if inside:
        return f"hooks are set on {inside[0]}, which would not fire"
    known = _obstacles.setdefault(model, {})
    state = state_of(model)
    if state not in known:
        if foreign:
            return "hooks of others are set, which a trial of the model would call"
        with paused(model):
            known[state] = _try(model)
    return known[state]


@contextmanager
def _fused(model: TransformerBridge) -> Iterator[None]:
    with using(model) as note:
        edits = [edit for edit in applied_edits(model) if hasattr(edit, "change")]
        replace_attention(model, NAME, editing, _all_sites(model, edits), note)
        yield


def _all_sites(model: TransformerBridge, edits: Sequence[Any]) -> list[Site]:
    kept = Kept()
    return [Site(block, edits, kept) for block in range(model.cfg.n_layers)]


class _FirstKey:
    """Some weight on the first key of each prompt, which no model may ignore."""

    def __init__(self, first: Tensor) -> None:
        self.first = first

    def hooked(self, scores: Tensor, hook: Any) -> Tensor:
        floor = torch.finfo(scores.dtype).min / 2
        own = Scores(0, lambda: scores, scores > floor)
        self.change(own)
        assert own.bias is not None
        return scores + own.bias.to(scores.dtype)

    def change(self, scores: Scores) -> None:
        keys = torch.arange(scores.visible.shape[-1], device=scores.visible.device)
        here = (keys == self.first.to(keys.device)[:, None])[:, None, None]
        scores.add(torch.where(here & scores.visible, 2.0, 0.0))


def _try(model: TransformerBridge) -> str:
    if state_of(model)[2]:
        return "the model is in compatibility mode, which alters its weights and masks"
    tokens = probe_tokens(model.tokenizer).to(model.cfg.device)
    edit = _FirstKey(tokens.attention_mask.argmax(dim=1))
    lands = SCORES in model_report(model).edits
    half = state_of(model)[0] in (torch.float16, torch.bfloat16)
    try:
        for edits in ([], [edit] if lands else []):
            names = [f"blocks.{b}.{SCORES}" for b in range(model.cfg.n_layers)] if edits else []
            with hooked(model, [(name, edit.hooked) for name in names]):
                eager = _steps(model, tokens)
            with using(model) as note:
                replace_attention(model, NAME, editing, _all_sites(model, edits), note)
                fused = _steps(model, tokens)
            for step, (one, other) in enumerate(zip(eager, fused, strict=True)):
                difference = float((one - other).abs().max() / one.abs().max())
                if not difference <= (0.1 if half else 1e-4):
                    what = "edited logits" if edits else "logits"
                    return (
                        f"{what} of step {step} differ from eager attention's by {difference:.1g}"
                    )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever goes wrong in a model that nobody has foreseen, eager attention remains.
        return str(error) or type(error).__name__
    return ""


@torch.no_grad()
def _steps(model: TransformerBridge, tokens: Any) -> list[Tensor]:
    """The logits of a prompt and of a few cached steps behind it, always the same tokens."""
    hf_model: Any = model.original_model
    mask, ids, options, found = tokens.attention_mask, tokens.input_ids, {}, []
    for _ in range(_STEPS):
        if accepts_mask_derived_position_ids(hf_model):
            options["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
        output = hf_model(input_ids=ids, attention_mask=mask, use_cache=True, **options)
        found.append(output.logits[:, -1].float())
        options["past_key_values"] = output.past_key_values
        ids = tokens.input_ids[:, -1:]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return found
