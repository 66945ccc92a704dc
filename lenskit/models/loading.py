"""Loading a model into a ``TransformerBridge`` that owns a tokenizer of ours."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformer_lens.model_bridge import TransformerBridge

from lenskit.models.check import check_model, set_report
from lenskit.models.hugging_face import (
    EMBEDDED,
    DeviceMap,
    load_hugging_face,
    model_location,
    require_model,
)
from lenskit.models.kv_cache import hand_on_cache
from lenskit.models.padding import limits_by_config, set_limits, try_limits
from lenskit.models.reference import ModelCheckError, Reference, use_eager_attention
from lenskit.models.templates import load_tokenizer, prepare_tokenizer
from lenskit.models.verdict import kept_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_OPTIONS = {"trust_remote_code": False}
_ROTATED_IN_FLOAT32 = {f"{name}ForCausalLM" for name in ("Olmo", "Olmo2", "Olmo3", "FlexOlmo")}


def load_model(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    quantization: Literal["4bit"] | None = None,
    check: bool | Literal["hooks"] = True,
    hf_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> TransformerBridge:
    """Load a causal language model with hooks, in evaluation mode, and check it.

    ``name_or_path`` is a local folder, a hub id, or ``"lenskit-mini"``, the model that comes
    with the library (the default). ``device``, ``dtype``, ``device_map`` (a model spread over
    several GPUs), ``quantization`` and ``options`` (``revision``, ``trust_remote_code``, which is
    ``False`` unless given, ``token``) are those of ``load_hugging_face``. ``hf_model``: a model
    already loaded; its device and dtype are kept, and it is rewired in place. ``tokenizer``: used
    instead of the folder's, and prepared in place; a ``hf_model`` without either brings that of
    the folder from which it was loaded.

    ``check``: ``True`` compares with Hugging Face's own patterns and hidden states, read from
    the same weights before they are wrapped, so it costs no memory; ``"hooks"`` only probes the
    hooks; ``False`` does neither. See ``check_model``. With ``True`` the probes are also run
    alone, without padding, and longer ones where the model has a window of at most 600 tokens.
    (Of ``"lenskit-mini"`` on a CPU the verdict is kept beside the weights, for just these files
    and packages; ``check_model`` checks again.)

    Where results depend on the length of the batch (longrope and dynamic rotary embeddings,
    attention to the best keys), only so many tokens are run as they do not yet: prompts and
    answers that are longer raise ``ValueError``. ``model_report(model).longest`` is that number.

    ``model.tokenizer`` is left padded, has a pad token, and its chat template is the folder's
    (``PLAIN_TEMPLATE`` for a base model). Raises ``ModelCheckError`` for a model that transformers
    or TransformerLens cannot open, and when the check fails; ``OSError`` and ``ValueError`` where
    a folder or a device is not there, or where ``hf_model`` comes without any tokenizer.

    >>> model = lk.load_model("lenskit-mini", device="cpu", check=False)
    >>> model.cfg.n_layers == len(vectors)
    True
    """
    if check not in (True, False, "hooks"):
        raise ValueError(f"check must be True, False or 'hooks', got {check!r}")
    placing: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "quantization": quantization,
    }
    if hf_model is not None and any(value is not None for value in placing.values()):
        raise ValueError(f"{', '.join(placing)} cannot be given with hf_model, which has its own")
    options["trust_remote_code"] = bool(options.get("trust_remote_code"))
    own = tokenizer is not None
    if tokenizer is not None:
        tokenizer = prepare_tokenizer(tokenizer)
    if hf_model is not None and name_or_path is None:
        name = str(getattr(hf_model.config, "_name_or_path", "") or "")
        if tokenizer is None:
            tokenizer = _own_tokenizer(hf_model, name, options)
        name = name or hf_model.config.model_type
    else:
        name = model_location(EMBEDDED if name_or_path is None else name_or_path)
        if hf_model is None:
            require_model(name, options)
        if tokenizer is None:
            tokenizer = _tokenizer(name, options)
    kept = None
    if hf_model is None:
        plain = name == model_location(EMBEDDED) and not own and options == _NO_OPTIONS
        hf_model = load_hugging_face(name, **placing, **options)
        on_cpu = hf_model.device.type == "cpu" and hf_model.dtype == torch.float32
        if check is True and plain and on_cpu and quantization is None:
            kept = kept_report(name)
    # A model made in memory may not say what it is.
    hf_model.config.architectures = hf_model.config.architectures or [type(hf_model).__name__]
    hf_model.eval()
    _check_vocabulary(hf_model, tokenizer)

    use_eager_attention(hf_model)
    reference, limits = None, limits_by_config(hf_model.config)
    try:
        if check is True and kept is None:
            reference = Reference.read(hf_model, tokenizer)
            limits = try_limits(hf_model, tokenizer, reference)
    except (ModelCheckError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelCheckError(
            f"transformers cannot run {name} ({type(hf_model).__name__}): {_reason(error)}"
        ) from error
    try:
        model = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=_decoy(tokenizer, name),
            device=hf_model.device,
            dtype=hf_model.dtype,
            trust_remote_code=options["trust_remote_code"],
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelCheckError(
            f"TransformerLens cannot open {name} ({type(hf_model).__name__}): {_reason(error)}"
        ) from error
    # The public setter would prepare the tokenizer a second time, in the bridge's manner.
    model._tokenizer = tokenizer
    _keep_rotated_dtype(model)
    hand_on_cache(model)
    set_limits(model, limits)
    if kept is not None:
        set_report(model, kept)
    elif check:
        check_model(model, reference)
    return model


def model_fingerprint(model: TransformerBridge) -> str:
    """``"name:hash"``: the last part of the model's name, and a hash of its shape and weights.

    The hash covers the config's sizes and a few entries of 16 weight tensors, rounded to
    bfloat16, so that it is the same on every device and in float32 and bfloat16.

    >>> lk.model_fingerprint(model) == capture.model == vectors.model
    True
    """
    cfg = model.cfg
    digest = hashlib.sha256()
    sizes = (cfg.architecture, cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head)
    digest.update(repr(sizes).encode())
    weights = [
        weight
        for weight in model.original_model.parameters()
        if weight.is_floating_point() and weight.device.type != "meta" and weight.numel() > 0
    ]
    step = max(1, len(weights) // 16)
    for weight in weights[::step][:16]:
        entries = weight.detach().flatten()[:64].to(device="cpu", dtype=torch.bfloat16)
        digest.update(entries.view(torch.int16).numpy().tobytes())
    return f"{Path(str(cfg.model_name)).name}:{digest.hexdigest()[:16]}"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, whatever their folders are called."""
    return one.rpartition(":")[2] == other.rpartition(":")[2]


def _reason(error: Exception) -> str:
    # It comes first; a list of all that could be opened may follow.
    return str(error).split(" Available architectures")[0] or type(error).__name__


def _tokenizer(name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(name, **options)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ModelCheckError(
            f"the tokenizer of {name} cannot be opened: {type(error).__name__}: {error}"
        ) from error


def _own_tokenizer(
    hf_model: PreTrainedModel, name: str, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder or hub id from which ``hf_model`` says it was loaded."""
    kind = type(hf_model).__name__
    if not name:
        raise ValueError(
            f"hf_model, a {kind}, was made in memory and names no folder: give its tokenizer too "
            "(tokenizer=)"
        )
    try:
        return _tokenizer(model_location(name), options)
    except (ValueError, OSError, ModelCheckError) as error:
        raise ValueError(
            f"hf_model, a {kind}, comes without a tokenizer, and {name!r}, from which it says it "
            f"was loaded, gave none: give its tokenizer too (tokenizer=). {error}"
        ) from error


def _check_vocabulary(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = hf_model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
            raise ValueError(
                f"pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, but the model "
                f"embeds {rows} tokens; set tokenizer.pad_token to one of them"
            )
        # Padding is masked, so any token that the model can embed will do.
        tokenizer.pad_token = tokenizer.eos_token


def _keep_rotated_dtype(model: TransformerBridge) -> None:
    """Cast rotated queries and keys back, as Hugging Face does and this bridge forgets to.

    By PyTorch's own hooks, since the bridge's are the user's, to be listed and removed.
    """
    dtype = model.original_model.dtype
    if model.cfg.architecture not in _ROTATED_IN_FLOAT32 or dtype == torch.float32:
        return
    for block in model.blocks:
        for point in (block.attn.hook_rot_q, block.attn.hook_rot_k):
            point.register_forward_hook(lambda module, given, rotated: rotated.to(dtype))


def _decoy(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """A copy for booting, which the bridge may alter and believes to have BOS switched on.

    Without that flag it would load the tokenizer anew from disk or from the hub.
    """
    decoy = copy.deepcopy(tokenizer)
    decoy.init_kwargs = {**decoy.init_kwargs, "name_or_path": name, "add_bos_token": True}
    return decoy
