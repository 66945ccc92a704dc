"""Hugging Face's own model of a folder or a hub id, on a device and in a dtype that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file, logging

from lenskit.models.reference import ModelCheckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "lenskit-mini"
DeviceMap = str | Mapping[str, int | str]
# Ways to spread a model that accelerate knows by name.
_SPREAD = {"auto", "balanced", "balanced_low_0", "sequential"}


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
    (In 8 bits a prompt's values depend on its batch.) ``options`` go to Hugging Face; no code of
    the model's folder is run unless ``trust_remote_code=True`` is among them.

    Raises ``OSError`` where there is no such folder or hub id, ``ImportError`` where a package is
    not installed, ``ValueError`` where a device is not there or the weights do not fit onto the
    GPUs, and ``ModelCheckError`` for what transformers cannot open as a causal language model.
    """
    name = model_location(name_or_path)
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"), "device")
    if device_map is not None:
        _require("accelerate", f"device_map={device_map!r}")
        named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        for one in {*named} - _SPREAD - {"disk"}:
            _device(f"cuda:{one}" if isinstance(one, int) else one, "device_map")
        place = torch.device("cpu") if {str(one) for one in named} == {"cpu"} else place
    options["dtype"] = _dtype(dtype, place)
    options["trust_remote_code"] = bool(options.get("trust_remote_code"))
    require_model(name, options)
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, options["dtype"])
        device_map = {"": place} if device_map is None else device_map
    try:
        with _bars(shown=name != model_location(EMBEDDED)):
            hf_model = AutoModelForCausalLM.from_pretrained(
                name, attn_implementation="eager", device_map=device_map, **options
            )
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            reason = "is not a causal language model of transformers"
        elif isinstance(error, ValueError):
            raise
        else:
            reason = f"cannot be opened by transformers: {type(error).__name__}: {error}"
        raise ModelCheckError(f"{name} {reason}") from error
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


def model_location(name_or_path: str | Path) -> str:
    """The folder or hub id that a name stands for.

    Raises ``FileNotFoundError`` for a path where there is nothing, and ``NotADirectoryError`` for
    a file.
    """
    name = str(name_or_path)
    if name == EMBEDDED:
        from lenskit._data import data_path

        return str(data_path(EMBEDDED))
    place = Path(name).expanduser()
    if place.is_dir():
        return str(place)
    if place.exists():
        raise NotADirectoryError(f"{name!r} is a file; give the folder that the model lies in")
    hub_id = name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "~", "/"))
    if isinstance(name_or_path, Path) or not hub_id:
        raise FileNotFoundError(f"there is no folder {name!r} (looked from {Path.cwd()})")
    return name


def require_model(name: str, options: Mapping[str, Any]) -> None:
    """Raise ``OSError`` for a hub id that cannot be had, in words that do for a mistyped folder."""
    if Path(name).is_dir() or "gguf_file" in options:
        return
    known = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    try:
        cached_file(name, "config.json", **known)
    except OSError as error:
        raise OSError(
            f"there is no folder {name!r} in {Path.cwd()}, and no model of that name could be had "
            f"from the hub: {error}"
        ) from error


def _device(device: str | torch.device | int, argument: str) -> torch.device:
    """The device, if this machine has it."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{argument} {device!r} is no device that torch knows; try 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        number = torch.cuda.device_count()
        gpus = ", ".join(f"cuda:{i}" for i in range(number)) if number else "no GPU"
        raise ValueError(
            f"{argument} {str(device)!r} is not on this machine: torch sees {gpus} "
            "('cpu' is always there)"
        ) from error
    return place


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
