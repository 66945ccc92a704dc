"""A tiny random model that reads the embedded tokenizer, and a task for any model."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import tiny
from transformers import AutoTokenizer

from lenskit.models import load_model, model_location
from lenskit.tasks import Task, TaskPrompt, judge_label

INSTRUCTION = "Answer in one word."


def task(*texts, name="one"):
    """A task whose prompts begin with an instruction, and whose target is «Rain»."""
    prompts = [
        TaskPrompt(({"role": "user", "content": f"{INSTRUCTION} {text}"},), INSTRUCTION, "Rain")
        for text in texts
    ]
    return Task(name, tuple(prompts), judge_label, 4)


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
