"""Pattern rows of the candidate tokens while the model runs fused attention.

A hook on the pattern makes a model compute it for every token, which costs more than the rest of
the forward pass on long prompts. Here each block's own attention module takes the place of the
bridge's for the time of one batch, and calls a function of ours that computes the few rows wanted
from the rotated queries and keys that it is given, and then the library's fused attention.

Prompts are padded on the right meanwhile. A causal model never sees that padding, so that no mask
is needed, fused attention skips the half that lies in the future, and memory does not grow with
the squared length. What the prompts of a batch begin with alike is run once (``lenskit.starts``).
Hooks on the residual stream fire as ever; those inside attention do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import PreTrainedConfig

from lenskit.models.check import RESID
from lenskit.models.rows import NAME, Reader, Unsupported, reading
from lenskit.models.starts import Start, common_start, left_aligned, probes, worth_sharing
from lenskit.models.templates import Tokens
from lenskit.models.use import Undo, has_hooks, hooked, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Receive = Callable[[int, Tensor], None]
# How far rounding may lead two ways of computing the same, on average: in half precision single
# weights and coordinates can be off by much more.
_HALF = {"pattern": 5e-3, "resid_post": 2e-2}
_verdicts: WeakKeyDictionary[Any, dict[tuple, Verdict]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Verdict:
    """What a trial found: why ``forward`` must not be used, and whether prompts share a start."""

    obstacle: str = ""
    shares: bool = False


def obstacle(model: TransformerBridge, eager: Callable[..., None]) -> str:
    """Why ``forward`` must not be used now, in words; empty where it may be.

    Hooks that others have set need the ordinary pass. Otherwise the model is tried, once for each
    dtype and device: on two left-padded prompts rows and residuals must be those of ``eager``, a
    function with the arguments of ``forward``.
    """
    if has_hooks(model):
        return "hooks are set on the model, and those inside attention would not fire"
    verdicts = _verdicts.setdefault(model, {})
    if state_of(model) not in verdicts:
        verdicts[state_of(model)] = _try(model, eager)
    return verdicts[state_of(model)].obstacle


def shares(model: TransformerBridge) -> bool:
    """Whether ``obstacle`` found that ``forward`` runs what prompts begin with alike only once."""
    return _verdicts.get(model, {}).get(state_of(model), Verdict()).shares


def forward(
    model: TransformerBridge,
    tokens: Tokens,
    candidates: int,
    blocks: Sequence[int],
    *,
    pattern: Receive | None = None,
    state: Receive | None = None,
) -> None:
    """Run one batch with fused attention and hand on what the candidate tokens see and hold.

    ``pattern(layer, rows)`` gets float32 ``[prompt, head, candidate, key]``, keys right-aligned as
    in ``tokens`` and 0 on padding; ``state(layer, rows)`` gets ``resid_post``
    ``[prompt, candidate, d_model]``. Nothing behind the last of ``blocks`` is run.

    Raises ``Unsupported``, and ``obstacle`` will say so from then on, where attention is given
    something that is not understood or never reaches our function. The model is then, as after
    any exception, as it was.
    """
    verdicts = _verdicts.setdefault(model, {})
    try:
        _forward(
            model,
            tokens,
            candidates,
            blocks,
            pattern=pattern,
            state=state,
            shared=worth_sharing if shares(model) else None,
        )
    except Unsupported as error:
        verdicts[state_of(model)] = Verdict(str(error))
        raise


def _forward(
    model: TransformerBridge,
    tokens: Tokens,
    candidates: int,
    blocks: Sequence[int],
    *,
    pattern: Receive | None,
    state: Receive | None,
    shared: Callable[[Tensor, int], int] | None,
) -> None:
    """``shared`` tells how many of the left-aligned ids, at most so many, are run only once."""
    shift = tokens.input_ids.shape[1] - tokens.lengths
    ids = left_aligned(tokens)
    number = shared(ids, int(tokens.lengths.min()) - candidates) if shared else 0
    positions = tokens.lengths[:, None] + torch.arange(-candidates, 0, device=shift.device)
    positions = positions - number
    read: set[tuple[str, int]] = set()

    def receive_rows(layer: int, rows: Tensor) -> None:
        if pattern is not None:
            pattern(layer, _right_aligned(rows, shift.to(rows.device)))
        read.add(("pattern", layer))

    def read_state(layer: int, value: Tensor, hook: Any) -> None:
        at = positions.to(value.device)
        if state is not None:
            state(layer, value[torch.arange(len(at), device=at.device)[:, None], at])
        read.add(("resid_post", layer))
        if layer == blocks[-1]:
            raise StopAtLayerException(value)

    readers = [
        Reader(
            positions,
            partial(receive_rows, layer) if pattern is not None and layer in blocks else None,
            state is None and layer == blocks[-1],
            number,
        )
        for layer in range(model.cfg.n_layers)
    ]
    hooks = [
        (f"blocks.{layer}.{RESID}", partial(read_state, layer))
        for layer in (blocks if state is not None else ())
    ]
    with torch.no_grad():
        start = _start(model, ids[:1, :number], blocks[-1]) if number else None
        with _fused_attention(model, readers), hooked(model, hooks):
            _run(model, ids[:, number:], start)
    kinds = [name for name, wanted in (("pattern", pattern), ("resid_post", state)) if wanted]
    if missing := [f"{k} of block {n}" for k in kinds for n in blocks if (k, n) not in read]:
        raise Unsupported(f"{', '.join(missing)} did not come by; see check_model")


def _start(model: TransformerBridge, ids: Int[Tensor, "1 pos"], last: int) -> Start:
    """Keys and values of these tokens, up to those of the ``last`` block wanted."""
    start = Start()
    nowhere = torch.zeros(1, 0, dtype=torch.long, device=ids.device)
    readers = [Reader(nowhere, None, layer == last) for layer in range(model.cfg.n_layers)]
    with _fused_attention(model, readers):
        _run(model, ids, start)
    start.complete = True
    if start.get_seq_length() != ids.shape[1]:
        raise Unsupported("the model keeps no keys and values of what prompts begin with")
    return start


def _run(model: TransformerBridge, ids: Int[Tensor, "prompt pos"], start: Start | None) -> None:
    with suppress(StopAtLayerException):
        model.original_model(input_ids=ids, past_key_values=start, use_cache=start is not None)


def state_of(model: TransformerBridge) -> tuple[torch.dtype, torch.device, bool]:
    """What a trial is good for: dtype, device, and whether the model is in compatibility mode."""
    weight = next(model.original_model.parameters())
    return weight.dtype, weight.device, bool(getattr(model, "compatibility_mode", False))


def _try(model: TransformerBridge, eager: Callable[..., None]) -> Verdict:
    dtype, _, compatibility_mode = state_of(model)
    if compatibility_mode:
        return Verdict("the model is in compatibility mode, which alters its weights and masks")
    tokens = probes(model.tokenizer).to(model.cfg.device)
    candidates, blocks = int(tokens.lengths.min()) // 2, range(model.cfg.n_layers)
    found: list[dict[tuple[str, int], Tensor]] = []
    ways = (
        eager,
        partial(_forward, shared=None),
        partial(_forward, shared=common_start),
    )
    half = dtype in (torch.float16, torch.bfloat16)
    problem = ""
    for run in ways:
        found.append({})

        def keep(kind: str, layer: int, rows: Tensor) -> None:
            found[-1][kind, layer] = rows.float().cpu()

        try:
            run(
                model,
                tokens,
                candidates,
                blocks,
                pattern=partial(keep, "pattern"),
                state=partial(keep, "resid_post"),
            )
            problem = _difference(found[0], found[-1], half)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever goes wrong in a model that nobody has foreseen, the exact pass remains.
            problem = str(error) or type(error).__name__
        if problem and run is not ways[-1]:
            return Verdict(problem)
    return Verdict(shares=not problem)


def _difference(
    exact: dict[tuple[str, int], Tensor], found: dict[tuple[str, int], Tensor], half: bool
) -> str:
    """Where two ways differ by more than rounding, in words; empty where they agree."""
    for (kind, layer), values in exact.items():
        difference = (found[kind, layer] - values).abs()
        scale = 1.0 if kind == "pattern" else float(values.abs().max())
        largest, mean = float(difference.max()) / scale, float(difference.mean()) / scale
        if not (largest <= (0.2 if half else 1e-5) and mean <= (_HALF[kind] if half else 1e-5)):
            return f"{kind} of block {layer} differs from that of eager attention by {largest:.1g}"
    return ""


@contextmanager
def _fused_attention(model: TransformerBridge, readers: Sequence[Reader]) -> Iterator[None]:
    """Each block runs its own attention module, which calls ``attend`` with its reader."""
    with using(model) as note:
        replace_attention(model, NAME, reading, readers, note)
        yield


def replace_attention(
    model: TransformerBridge,
    implementation: str,
    registered: dict[nn.Module, Any],
    entries: Sequence[Any],
    note: Callable[[Undo], None],
) -> None:
    """Let each block run its own attention module, which calls the function ``implementation``.

    That finds the block's entry in ``registered``. ``note`` is told how to undo each change.
    """
    sites = list(_sites(model))
    modules = model.original_model.modules()
    configs = {
        id(c): c for m in modules if isinstance(c := vars(m).get("config"), PreTrainedConfig)
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    for (parent, name, bridge, native), entry in zip(sites, entries, strict=True):
        note(partial(setattr, parent, name, bridge))
        note(partial(registered.pop, native, None))
        setattr(parent, name, native)
        registered[native] = entry
    for config, own in before:
        note(partial(setattr, config, "_attn_implementation_internal", own))
        config._attn_implementation_internal = implementation


def _sites(model: TransformerBridge) -> Iterator[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """For each block: a module, the name in it of the bridge's attention, that, and the native."""
    for layer, block in enumerate(model.blocks):
        bridge: Any = block._modules.get("attn")
        native: Any = getattr(bridge, "original_component", None)
        parent: Any = block.original_component
        path = str(getattr(bridge, "name", "")).split(".")
        for part in path[:-1]:
            parent = getattr(parent, part, None)
        found: Any = getattr(parent, path[-1], None)
        if native is None or found is not bridge:
            raise Unsupported(f"block {layer} has no attention module that could be replaced")
        yield parent, path[-1], bridge, native


def _right_aligned(
    rows: Float[Tensor, "prompt head candidate key"], shift: Int[Tensor, " prompt"]
) -> Float[Tensor, "prompt head candidate key"]:
    """Keys moved to the right by each prompt's padding, zeros in their place."""
    source = torch.arange(rows.shape[-1], device=rows.device) - shift[:, None]
    moved = rows.gather(-1, source.clamp(min=0)[:, None, None].expand_as(rows))
    return moved.masked_fill((source < 0)[:, None, None], 0)
