"""A tiny random model that reads the embedded tokenizer, so that its prompts fit."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import tiny
from transformers import AutoTokenizer

from lenskit.models import load_model, model_location


@cache
def small_model(seed: int = 0):
    """Loaded once for all tests, which must leave it as it was; another draw for another seed."""
    tokenizer = AutoTokenizer.from_pretrained(model_location("lenskit-mini"))
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.tiny_folder(
            Path(folder) / "model",
            "llama-gqa",
            tokenizer=tokenizer,
            seed=seed,
            vocab_size=len(tokenizer),
            **ids,
        )
        return load_model(path, device="cpu", check="hooks")
