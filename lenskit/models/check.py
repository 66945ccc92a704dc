"""What a loaded model can do: which hooks are true, and which edits reach the logits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lenskit._display import Displayed
from lenskit.models.padding import limits_of
from lenskit.models.reference import ModelCheckError, Reference, probe_tokens
from lenskit.models.templates import Tokens
from lenskit.models.use import hooked

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

PATTERN = "attn.hook_pattern"
SCORES = "attn.hook_attn_scores"
RESID = "hook_resid_post"
_KINDS = (
    "hook_resid_pre",
    "hook_resid_mid",
    RESID,
    "hook_attn_out",
    "hook_mlp_out",
    *(f"attn.hook_{part}" for part in ("q", "k", "v", "z", "rot_q", "rot_k")),
    SCORES,
    PATTERN,
)

# How PyTorch says that a dtype is the matter.
_DTYPE = re.compile(r"dtype|scalar type|not implemented for '|BFloat16|\bHalf\b")


@dataclass(frozen=True, repr=False)
class ModelReport(Displayed):
    """What ``check_model`` found. Hook names are those after ``blocks.{l}.``.

    ``fires``: hooks that fire in every block. ``edits``: of ``hook_resid_post``,
    ``attn.hook_attn_scores`` and ``attn.hook_pattern``, those whose edits reach the logits.
    ``pattern_error`` and ``resid_error``: greatest difference from Hugging Face's own, absolute
    and relative to the largest entry of the block; ``None`` when there was no reference.
    ``longest``: the most tokens of a prompt and its answer, beyond which prompts in a batch would
    change each other, so that they are refused; ``None`` without such a limit. ``untried``:
    lengths in the model's config that are too great to be tried at load.
    """

    blocks: int
    heads: int
    d_model: int
    fires: tuple[str, ...]
    edits: tuple[str, ...]
    pattern_error: float | None = None
    resid_error: float | None = None
    longest: int | None = None
    untried: tuple[str, ...] = ()

    def require_edit(self, hook: str) -> None:
        """Raise ``ModelCheckError`` unless edits at this hook take effect."""
        if hook not in self.edits:
            raise ModelCheckError(
                f"editing {hook} does not change this model's logits; edits that do: "
                f"{', '.join(self.edits) or 'none'}"
            )


_reports: WeakKeyDictionary[Any, ModelReport] = WeakKeyDictionary()


def model_report(model: TransformerBridge) -> ModelReport:
    """The report made when the model was loaded; without one, hooks are probed now.

    >>> lk.model_report(model).require_edit("hook_resid_post")
    """
    report = _reports.get(model)
    return check_model(model) if report is None else report


def set_report(model: TransformerBridge, report: ModelReport) -> None:
    """Let ``model_report`` return this report, made earlier on the same weights."""
    _reports[model] = report


def check_model(
    model: TransformerBridge, reference: PreTrainedModel | Reference | None = None
) -> ModelReport:
    """Verify on two left-padded prompts that the model's hooks mean what they say.

    Patterns of real query rows must sum to one (to less where sinks are learned), and editing
    ``hook_resid_post`` must change the logits; a cached step must give what an uncached pass does.
    With a ``reference`` (the same weights in a Hugging Face model that no bridge has wrapped,
    eager, same dtype) patterns and ``hook_resid_post`` must equal its own. Its last hidden state
    is taken after the final norm, so there the model's final norm is applied to our last
    ``hook_resid_post`` before comparing.

    Raises ``ModelCheckError`` that lists all that fails.

    >>> lk.check_model(model).edits
    ('hook_resid_post', 'attn.hook_attn_scores', 'attn.hook_pattern')
    """
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference.read(reference, model.tokenizer)
    tokens = probe_tokens(model.tokenizer).to(model.cfg.device)
    blocks = range(model.cfg.n_layers)
    limits = limits_of(model)
    name = f"{model.cfg.model_name} ({model.cfg.architecture}, {model.cfg.dtype})"
    try:
        clean, seen, final = _read(model, tokens)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if limits.dependence:
            raise ModelCheckError(f"{name} cannot be used: {limits.dependence}") from error
        advice = ". Another dtype may (dtype='float32')" if _DTYPE.search(str(error)) else ""
        raise ModelCheckError(
            f"{name} does not run with hooks: {error or type(error).__name__}{advice}"
        ) from error
    fires = tuple(kind for kind in _KINDS if all((layer, kind) in seen for layer in blocks))

    failures = [
        f"{kind} does not fire in block(s) "
        f"{', '.join(str(layer) for layer in blocks if (layer, kind) not in seen)}"
        + (", which may have no softmax attention" if kind == PATTERN else "")
        for kind in (PATTERN, RESID)
        if kind not in fires
    ]
    if not bool(torch.isfinite(clean).all()):
        failures.append("the logits are not finite")
    if limits.dependence:
        failures.append(limits.dependence)
    errors: tuple[float | None, float | None] = (None, None)
    if not failures:
        failures += _sums(seen, tokens, model)
        if reference is not None:
            different, errors = _differences(seen, final, reference, tokens, _tolerance(model))
            failures += different
    edits = tuple(
        kind
        for kind, some in _edits(tokens, model.cfg.n_heads).items()
        if kind in fires and _takes_effect(model, tokens, kind, some, clean)
    )
    if RESID in fires and RESID not in edits:
        failures.append(f"editing {RESID} does not change the logits")
    if not failures:
        failures += _cached(model, tokens)
    if failures:
        raise ModelCheckError(f"{name} cannot be used: " + "; ".join(failures))
    cfg = model.cfg
    report = ModelReport(
        cfg.n_layers,
        cfg.n_heads,
        cfg.d_model,
        fires,
        edits,
        *errors,
        longest=limits.longest,
        untried=limits.untried,
    )
    set_report(model, report)
    return report


def _tolerance(model: TransformerBridge) -> float:
    return 1e-4 if model.cfg.dtype == torch.float32 else 3e-2


def _logits(model: TransformerBridge, tokens: Tokens) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        # Architectures that discard an edit say so in a warning; the report says it instead.
        warnings.simplefilter("ignore")
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return logits[:, -1].float()


def _read(
    model: TransformerBridge, tokens: Tokens
) -> tuple[Tensor, dict[tuple[int, str], Tensor | None], Tensor | None]:
    """Last logits, what each block's hooks returned, and the output of the final norm."""
    seen: dict[tuple[int, str], Tensor | None] = {}
    final: list[Tensor] = []

    def reader(layer: int, kind: str) -> Callable[..., None]:
        def read(value: Tensor, hook: Any) -> None:
            keep = kind in (PATTERN, RESID)
            seen[layer, kind] = value.detach().float().cpu().clone() if keep else None

        return read

    known = model.hook_dict
    hooks: list[tuple[str, Callable[..., None]]] = [
        (f"blocks.{layer}.{kind}", reader(layer, kind))
        for layer in range(model.cfg.n_layers)
        for kind in _KINDS
        if f"blocks.{layer}.{kind}" in known
    ]
    with hooked(model, hooks):
        clean = _logits(model, tokens)
    last = seen.get((model.cfg.n_layers - 1, RESID))
    if last is not None and hasattr(model, "ln_final"):
        weight = next(model.ln_final.parameters(), None)
        device = tokens.input_ids.device if weight is None else weight.device
        with torch.no_grad():
            final.append(model.ln_final(last.to(device, model.cfg.dtype)).float().cpu())
    return clean, seen, final[0] if final else None


def _sums(seen: dict, tokens: Tokens, model: TransformerBridge) -> list[str]:
    real = tokens.attention_mask.bool().cpu()
    # A learned sink takes part of the attention, which is then on no key.
    sinks = any(name.endswith("sinks") for name, _ in model.original_model.named_parameters())
    least = 0.0 if sinks else 0.98
    wrong = []
    for layer in range(model.cfg.n_layers):
        sums = seen[layer, PATTERN].sum(dim=-1).movedim(1, -1)[real]
        if not bool(((sums > least) & (sums < 1.02)).all()):
            wrong.append(f"{PATTERN} of block {layer} does not sum to one over the keys")
    return wrong


def _cached(model: TransformerBridge, tokens: Tokens) -> list[str]:
    """Whether the last token behind a cache of the others gets the logits of a whole pass.

    A bridge that does not know its model's cache drops it without a word.
    """
    ids = tokens.input_ids[tokens.attention_mask.bool().all(1)][:1]
    with torch.no_grad():
        whole = model.original_model(input_ids=ids, use_cache=False).logits[:, -1].float()
        begun = model.original_model(input_ids=ids[:, :-1], use_cache=True)
        cache = getattr(begun, "past_key_values", None)
        if cache is None:
            return []
        last = model.original_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    difference = float((last.logits[:, -1].float() - whole).abs().max() / whole.abs().max())
    if difference <= (1e-3 if model.cfg.dtype == torch.float32 else 0.1):
        return []
    return [
        f"a cached step differs from an uncached pass by {difference:.2g} (relative), so "
        f"generation would be wrong; TransformerLens {version('transformer-lens')} may not know "
        f"the cache of transformers {version('transformers')}, try an earlier one"
    ]


def _differences(
    seen: dict,
    final: Tensor | None,
    reference: Reference,
    tokens: Tokens,
    tolerance: float,
) -> tuple[list[str], tuple[float, float]]:
    real = tokens.attention_mask.bool().cpu()
    blocks = len(reference.patterns)
    failures, patterns, resids = [], [0.0], [0.0]
    for layer in range(blocks):
        ours, theirs = seen.get((layer, PATTERN)), reference.patterns[layer]
        if ours is None or ours.shape != theirs.shape:
            failures.append(f"{PATTERN} of block {layer} has not the shape {tuple(theirs.shape)}")
            continue
        difference = (ours - theirs).movedim(1, -1)[real].abs().max().item()
        patterns.append(difference)
        if not difference <= tolerance:
            failures.append(f"{PATTERN} of block {layer} is off by {difference:.2g}")

        state = seen[layer, RESID] if layer < blocks - 1 else final
        if state is None:
            continue
        theirs = reference.hidden_states[layer + 1][real]
        difference = ((state[real] - theirs).abs().max() / theirs.abs().max()).item()
        resids.append(difference)
        if not difference <= tolerance:
            failures.append(f"{RESID} of block {layer} is off by {difference:.2g} (relative)")
    return failures, (max(patterns), max(resids))


def _edits(tokens: Tokens, heads: int) -> dict[str, list[Callable[..., Tensor]]]:
    """Edits of each kind, one of which at least no model may ignore.

    Scores are edited in one head at a time. What it attends to in any case changes nothing, so
    that another head may have to tell.
    """
    first = tokens.attention_mask.argmax(dim=1)

    def one_key(head: int, scores: Tensor, hook: Any) -> Tensor:
        bias = torch.zeros(len(first), heads, 1, scores.shape[-1], device=scores.device)
        bias[torch.arange(len(first)), head, 0, first.to(scores.device)] = 30.0
        return scores + bias.to(scores.dtype)

    def no_attention(pattern: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(pattern)

    def other_coordinates(resid: Tensor, hook: Any) -> Tensor:
        return resid.roll(1, dims=-1)

    return {
        RESID: [other_coordinates],
        SCORES: [partial(one_key, head) for head in range(heads)],
        PATTERN: [no_attention],
    }


def _takes_effect(
    model: TransformerBridge,
    tokens: Tokens,
    kind: str,
    edits: Sequence[Callable[..., Tensor]],
    clean: Tensor,
) -> bool:
    """Whether one of the edits changes the last logits, in the first block and in the last.

    Without it they must be what they were.
    """

    def moved(layer: int, edit: Callable[..., Tensor]) -> bool:
        with hooked(model, [(f"blocks.{layer}.{kind}", edit)]):
            return _differs(_logits(model, tokens), clean)

    landed = all(any(moved(layer, edit) for edit in edits) for layer in {0, model.cfg.n_layers - 1})
    return landed and not _differs(_logits(model, tokens), clean)


def _differs(logits: Tensor, clean: Tensor) -> bool:
    return bool((logits - clean).abs().max() > 1e-6 * clean.abs().max())
