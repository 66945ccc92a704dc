"""What a training run writes: its state, so that it can be stopped and resumed, and the model.

The state is one safetensors file, the model an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lenskit.embedded.card import write_card

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose groups stand beside the others, each name with its spaces, as plain JSON."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain |= value if isinstance(value, Mapping) else {name: value}
    return json.loads(json.dumps({name.replace("_", " "): v for name, v in plain.items()}))


def run_settings(model: LlamaForCausalLM, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the state, as plain JSON."""
    return {**settings, **{name: getattr(model.config, name) for name in SHAPE}}


def save_state(
    path: Path,
    model: LlamaForCausalLM,
    optims: list[torch.optim.Optimizer],
    step: int,
    log: list[dict],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """One safetensors file with weights, optimizer states, the step, the log and the settings."""
    tensors = {
        f"model.{k}": v.detach() for k, v in model.state_dict().items() if "lm_head" not in k
    }
    for i, optimizer in enumerate(optims):
        for j, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{i}.{j}.{key}"] = torch.as_tensor(value)
    temporary = path.with_suffix(".tmp")
    metadata = {"step": str(step), "log": json.dumps(log), "settings": json.dumps(settings)}
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def load_state(
    path: Path,
    model: LlamaForCausalLM,
    optims: list[torch.optim.Optimizer],
    settings: Mapping[str, Any] | None = None,
) -> tuple[int, list[dict]]:
    """Restore what ``save_state`` wrote; returns the next step and the log.

    Raises ValueError when ``settings`` are given and the state was written under others.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if settings is not None:
        kept = json.loads(metadata.get("settings", "null")) or {}
        other = [
            f"{k} {kept.get(k, 'unknown')} (now {v})"
            for k, v in settings.items()
            if kept.get(k) != v
        ]
        if other:
            raise ValueError(
                f"state={str(path)!r} belongs to a run with other settings: {', '.join(other)}; "
                "give those, choose another state file, or delete it to start again"
            )
    tensors = load_file(path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    for i, optimizer in enumerate(optims):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, j, key = name.split(".")
                state.setdefault(int(j), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["step"]), json.loads(metadata["log"])


def save_model(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, figures: dict
) -> None:
    """An ordinary Hugging Face folder with 16-bit weights that ``transformers`` alone can load."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=50,
    ).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(folder)
