"""Loading a model into a ``TransformerBridge`` that owns a tokenizer of ours."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lenskit.models.check import ModelReport, check_model, model_report
from lenskit.models.reference import ModelCheckError, Reference
from lenskit.models.templates import (
    PLAIN_TEMPLATE,
    Tokens,
    chat_ids,
    load_tokenizer,
    position_ids,
    prepare_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PLAIN_TEMPLATE",
    "ModelCheckError",
    "ModelReport",
    "Tokens",
    "chat_ids",
    "check_model",
    "load_hugging_face",
    "load_model",
    "model_fingerprint",
    "model_report",
    "position_ids",
    "same_model",
]

EMBEDDED = "lenskit-mini"
DeviceMap = str | Mapping[str, int | str]
_ROTATED_IN_FLOAT32 = {f"{name}ForCausalLM" for name in ("Olmo", "Olmo2", "Olmo3", "FlexOlmo")}


def load_model(
    name_or_path: str | Path = EMBEDDED,
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
    with the library. ``device``, ``dtype``, ``device_map`` (a model spread over several GPUs),
    ``quantization`` and ``options`` (``revision``, ``trust_remote_code``, ``token``) are those of
    ``load_hugging_face``. ``hf_model``: a model already loaded; its device and dtype are kept, and
    it is rewired in place. ``tokenizer``: used instead of the folder's, and prepared in place.

    ``check``: ``True`` compares with Hugging Face's own patterns and hidden states, read from
    the same weights before they are wrapped, so it costs no memory; ``"hooks"`` only probes the
    hooks; ``False`` does neither. See ``check_model``.

    ``model.tokenizer`` is left padded, has a pad token, and its chat template is the folder's
    (``PLAIN_TEMPLATE`` for a base model). Raises ``ModelCheckError`` for a model that
    TransformerLens cannot open, and when the check fails.
    """
    if check not in (True, False, "hooks"):
        raise ValueError(f"check must be True, False or 'hooks', got {check!r}")
    name = model_location(name_or_path)
    placing: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "quantization": quantization,
    }
    if hf_model is not None and any(value is not None for value in placing.values()):
        raise ValueError(f"{', '.join(placing)} cannot be given with hf_model, which has its own")
    tokenizer = (
        load_tokenizer(name, **options) if tokenizer is None else prepare_tokenizer(tokenizer)
    )
    if hf_model is None:
        hf_model = load_hugging_face(name, **placing, **options)
    hf_model.eval()
    _check_vocabulary(hf_model, tokenizer)

    reference = None
    if check is True:
        hf_model.set_attn_implementation("eager")
        reference = Reference.read(hf_model, tokenizer)
    try:
        model = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=_decoy(tokenizer, name),
            device=hf_model.device,
            dtype=hf_model.dtype,
            trust_remote_code=bool(options.get("trust_remote_code", False)),
        )
    except (ValueError, NotImplementedError, RuntimeError) as error:
        # The reason comes first; a list of all that could be opened may follow.
        reason = str(error).split(" Available architectures")[0]
        raise ModelCheckError(
            f"TransformerLens cannot open {name} ({type(hf_model).__name__}): {reason}"
        ) from error
    # The public setter would prepare the tokenizer a second time, in the bridge's manner.
    model._tokenizer = tokenizer
    _keep_rotated_dtype(model)
    if check:
        check_model(model, reference)
    return model


def load_hugging_face(
    name_or_path: str | Path = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    quantization: Literal["4bit"] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model that ``load_model`` wraps: Hugging Face's own, with eager attention.

    ``device``: a GPU where there is one. ``dtype`` (a ``torch.dtype`` or its name): float32 on the
    CPU, else that of the checkpoint; with ``quantization``, that of the arithmetic.
    ``device_map`` (``"auto"``, or a device for each module) instead of ``device`` spreads the
    blocks over several GPUs; it needs accelerate. ``quantization="4bit"`` (NF4) needs
    accelerate and bitsandbytes, and a model whose queries, keys and values are separate matrices.
    (In 8 bits a prompt's values depend on its batch.) ``options`` go to Hugging Face.

    Raises ``ImportError`` where one of these is not installed, ``ValueError`` where the weights do
    not fit onto the GPUs, and ``ModelCheckError`` for what is no causal language model.
    """
    name = model_location(name_or_path)
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_map is not None:
        _require("accelerate", f"device_map={device_map!r}")
        named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        place = "cpu" if {str(one) for one in named} == {"cpu"} else place
    options["dtype"] = _dtype(dtype, torch.device(place))
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, options["dtype"])
        device_map = {"": place} if device_map is None else device_map
    try:
        with _bars(shown=name != model_location(EMBEDDED)):
            hf_model = AutoModelForCausalLM.from_pretrained(
                name, attn_implementation="eager", device_map=device_map, **options
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ModelCheckError(f"{name} is not a causal language model of transformers") from error
    if any(weight.is_meta for weight in hf_model.parameters()):
        raise ValueError(
            f"device_map={device_map!r} leaves weights on disk or outside the GPUs, where hooks "
            "cannot follow; use more GPUs, dtype='bfloat16' or quantization='4bit'"
        )
    return hf_model.to(place) if device_map is None else hf_model


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Transformers' progress bars as they are, or none: a small model is there at once."""
    enabled = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def model_fingerprint(model: TransformerBridge) -> str:
    """``"name:hash"``: the last part of the model's name, and a hash of its shape and weights.

    The hash covers the config's sizes and a few entries of 16 weight tensors, rounded to
    bfloat16, so that it is the same on every device and in float32 and bfloat16.
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


def model_location(name_or_path: str | Path) -> str:
    """The folder or hub id that a name stands for."""
    if str(name_or_path) != EMBEDDED:
        return str(name_or_path)
    from lenskit._data import data_path

    return str(data_path(EMBEDDED))


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not one of torch's; try 'float32' or 'bfloat16'")
    return found


def _quantization(quantization: str, dtype: torch.dtype | str) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization != "4bit":
        raise ValueError(
            f"quantization must be '4bit' or None, got {quantization!r}; load another kind with "
            "transformers and pass it as hf_model"
        )
    for package in ("accelerate", "bitsandbytes"):
        _require(package, f"quantization={quantization!r}")
    arithmetic = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arithmetic
    )


def _require(package: str, argument: str) -> None:
    if find_spec(package) is None:
        raise ImportError(
            f"{argument} needs {package}, which is not installed: pip install {package}"
        )


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
