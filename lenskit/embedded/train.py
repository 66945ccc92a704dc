"""Train the embedded model on its own grammar: ``python -m lenskit.embedded.train``.

Seeded and resumable: every step draws its dialogues from (seed, step), and the state is kept as
safetensors, so a run that was stopped and started again ends where it would have ended.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from jaxtyping import Bool, Float, Int
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lenskit.embedded.card import write_card
from lenskit.embedded.corpus import FIRST_MIXTURE, MIXTURE, dialogues
from lenskit.embedded.dialogue import Dialogue
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.state import load_state, run_settings, save_state
from lenskit.embedded.tokenizer import chat_text, train_tokenizer

TOKENIZER_DIALOGUES = 30_000
LOG_EVERY = 25
FIRST_STEPS = 2050


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 8 blocks, d_model 192, 8 heads over 4 key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[Dialogue]
) -> list[tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]]:
    """Token ids of each dialogue, and which of them are targets: the assistant turns to learn."""
    assistant = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n")
    rows = []
    for dialogue, ids in zip(
        batch,
        tokenizer([chat_text(d) for d in batch], add_special_tokens=False)["input_ids"],
        strict=True,
    ):
        target, turn, i = [False] * len(ids), -1, 0
        while i < len(ids):
            if ids[i : i + len(assistant)] != assistant:
                i += 1
                continue
            turn, i = turn + 1, i + len(assistant)
            end = ids.index(tokenizer.eos_token_id, i) + 1
            if dialogue.learn[turn]:
                target[i:end] = [True] * (end - i)
            i = end
        rows.append((torch.tensor(ids), torch.tensor(target)))
    return rows


def micro_batches(
    rows: list[tuple[Tensor, Tensor]], parts: int, pad: int
) -> list[tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]]:
    """Rows of like length together, right-padded: the fewest padding tokens to compute."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    size = -(-len(ordered) // parts)
    batches = []
    for i in range(0, len(ordered), size):
        ids, target = zip(*ordered[i : i + size], strict=True)
        batches.append(
            (
                torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=pad),
                torch.nn.utils.rnn.pad_sequence(list(target), batch_first=True),
            )
        )
    return batches


def bottleneck_mask(
    ids: Int[Tensor, "row pos"], narrow: Bool[Tensor, " row"], header: int
) -> Bool[Tensor, "row 1 pos pos"]:
    """Which keys each query may see: in narrow rows the answer does not see the prompt's text.

    The last answer of a narrow row sees the first token, the closing tokens of the template and
    itself, so whatever it needs to know of the prompt has to be carried by the closing tokens.
    ``header`` is the token that opens a message.
    """
    rows, width = ids.shape
    place = torch.arange(width, device=ids.device)
    last = torch.where(ids == header, place, -1).amax(1)[:, None, None]
    answer = place[None, :, None] >= last + 4  # header, role, end of header, blank line
    text = (place >= 1) & (place < last - 1)  # up to the token that ends the user's turn
    hidden = narrow[:, None, None] & answer & text
    return (torch.ones(width, width, dtype=torch.bool, device=ids.device).tril() & ~hidden)[:, None]


def target_loss(
    model: LlamaForCausalLM,
    ids: Int[Tensor, "row pos"],
    target: Bool[Tensor, "row pos"],
    mask: Bool[Tensor, "row 1 pos pos"] | None = None,
) -> Float[Tensor, ""]:
    """Summed cross entropy of the target tokens; the head runs on their positions alone."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = target[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum")


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (inner if parameter.ndim == 2 and "embed" not in name else outer).append(parameter)
    return [
        torch.optim.Muon(
            inner, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then linear decay to a hundredth."""
    return min((step + 1) / warmup, max(0.01, (steps - step) / max(1, steps - warmup)))


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 6e-3,
    seed: int = 0,
    bottleneck: float = 0.5,
    first_steps: int = FIRST_STEPS,
    state: Path | None = None,
    save_every: int = 100,
    parts: int = 8,
    progress: bool = True,
) -> list[dict]:
    """Train ``model`` in place on ``steps`` batches of the grammar's dialogues; returns the log.

    The first ``first_steps`` learn the concepts from ``FIRST_MIXTURE``; after them the dialogues
    are those of ``MIXTURE``, a share ``bottleneck`` of them narrow: see ``bottleneck_mask``. With
    ``state`` the run is kept in that file every ``save_every`` steps, and goes on from there.
    ``parts``: micro-batches a step. Raises ValueError for the state of a run with other settings.
    """
    grammar, device = load_grammar(), model.device.type
    optims = optimizers(model, learning_rate)
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    settings = run_settings(
        model,
        seed=seed,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        bottleneck=bottleneck,
        first_steps=first_steps,
    )
    start, log = 0, list[dict]()
    if state is not None:
        if state.exists():
            start, log = load_state(state, model, optims, settings)
        state.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not progress
    ) as bar:
        task = bar.add_task("training", total=steps, completed=start)
        began = time.perf_counter()
        for step in range(start, steps):
            random = Random(f"{seed}:{step}")
            first = step < first_steps
            stream = dialogues(grammar, random.getrandbits(48), FIRST_MIXTURE if first else MIXTURE)
            share = 0.0 if first else bottleneck
            rows = encode(tokenizer, list(islice(stream, batch)))
            number = sum(int(target.sum()) for _, target in rows)
            total = 0.0
            for ids, target in micro_batches(rows, parts, tokenizer.pad_token_id):
                narrow = torch.tensor([random.random() < share for _ in ids])
                mask = bottleneck_mask(ids, narrow, header) if bool(narrow.any()) else None
                ids, target = ids.to(model.device), target.to(model.device)
                mask = None if mask is None else mask.to(model.device)
                # On a CPU without matrix units bfloat16 is no faster than float32.
                with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                    loss = target_loss(model, ids, target, mask) / number
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optims:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * schedule(step, steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update(task, advance=1, description=f"training, loss {total:.3f}")
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                seconds = (log[-1]["seconds"] if log else 0.0) + time.perf_counter() - began
                began = time.perf_counter()
                log.append(
                    {"step": step + 1, "loss": round(total, 4), "seconds": round(seconds, 1)}
                )
            if state is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                save_state(state, model, optims, step + 1, log, settings)
    return log


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


def train(
    out: Annotated[Path, typer.Option(help="folder of the finished model")] = Path(
        "data/lenskit-mini"
    ),
    state: Annotated[Path, typer.Option(help="where the resumable state is kept")] = Path(
        ".lenskit-train/state.safetensors"
    ),
    steps: int = 4150,
    batch: int = 64,
    learning_rate: float = 6e-3,
    seed: int = 0,
    bottleneck: Annotated[float, typer.Option(help="share of narrow dialogues")] = 0.5,
    first_steps: Annotated[int, typer.Option(help="steps of the first mixture")] = FIRST_STEPS,
    device: str = "cpu",
    threads: int = 0,
    save_every: int = 100,
    parts: int = 8,
) -> None:
    """Train the embedded model and write it as a Hugging Face folder."""
    if threads:
        torch.set_num_threads(threads)
    tokenizer = train_tokenizer(
        islice(dialogues(load_grammar(), seed, FIRST_MIXTURE), TOKENIZER_DIALOGUES)
    )
    model = new_model(tokenizer, seed).to(device)
    log = train_model(
        model,
        tokenizer,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        bottleneck=bottleneck,
        first_steps=first_steps,
        state=state,
        save_every=save_every,
        parts=parts,
    )
    figures = {
        "parameters": model.num_parameters(),
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning rate": learning_rate,
        "narrow dialogues": bottleneck,
        "steps of the first mixture": first_steps,
        "device": device,
        "log": log,
    }
    save_model(out, model, tokenizer, figures)


if __name__ == "__main__":
    typer.run(train)
