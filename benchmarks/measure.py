"""What the benchmarks share: models of given shapes, a clock, peak memory, tables with targets."""

from __future__ import annotations

import copy
import ctypes
import functools
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lenskit.models import EMBEDDED, load_model
from lenskit.study.clock import seconds_of

# Random weights: how long a model takes does not depend on what it has learnt.
SHAPES: Mapping[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=3072,
    ),
    "small": dict(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ShapeOption = Annotated[str, typer.Option(help=f"embedded, {', '.join(SHAPES)}.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, …")]
QuickOption = Annotated[bool, typer.Option(help="Smaller numbers and fewer repeats.")]


@dataclass(frozen=True)
class Pair:
    """The same weights twice: in a bridge, and as Hugging Face's own model with fused attention."""

    model: Any
    plain: PreTrainedModel
    name: str

    @property
    def device(self) -> torch.device:
        return self.plain.device


@dataclass(frozen=True)
class Report:
    """A table of measurements, for the terminal and for Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: object) -> None:
        """Append a row; numbers are shown with three digits that count."""
        self.rows.append(tuple(_cell(cell) for cell in cells))

    def show(self) -> None:
        """Print it."""
        table = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        console.print(table)
        if self.note:
            console.print(self.note, highlight=False)

    def markdown(self) -> str:
        """The same as a Markdown table under its title."""
        lines = [
            f"### {self.title}",
            "",
            f"| {' | '.join(self.columns)} |",
            f"| --- |{' ---: |' * (len(self.columns) - 1)}",
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def load(shape: str, device: str = "cpu", dtype: str = "float32", **changes: Any) -> Pair:
    """The embedded model, or one with random weights; ``changes`` replace entries of its shape."""
    logging.disable_progress_bar()
    precision = getattr(torch, dtype)
    name = ", ".join([f"{shape}, {dtype}", *(f"{key}={value}" for key, value in changes.items())])
    if shape == "embedded":
        model = load_model(device=device, dtype=dtype, check=False)
        plain = AutoModelForCausalLM.from_pretrained(
            model.cfg.model_name, dtype=precision, attn_implementation="sdpa"
        )
        return Pair(model, plain.to(device).eval(), name)
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape must be embedded, {', '.join(SHAPES)}; got {shape}")
    config = LlamaConfig(
        **{**SHAPES[shape], **changes}, max_position_embeddings=8192, attn_implementation="sdpa"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            plain = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    # The copy that is wrapped has modules of its own, and shares the weights. No text is read, so
    # that the embedded model's tokenizer does.
    copied = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
    return Pair(load_model(EMBEDDED, hf_model=copied, check=False), plain, name)


def command(run: Callable[..., list[Report]]) -> None:
    """Read ``run``'s parameters from the command line, run it and print its tables."""

    @functools.wraps(run)
    def main(**options: Any) -> None:
        for report in run(**options):
            report.show()

    typer.run(main)


def medians(
    cases: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median seconds of each case, in turns, so that a busy machine hurts all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            taken = seconds_of(case, device)
            if turn:  # the first turn warms up
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """MB by which memory grows at most while ``run`` runs; nan where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if platform.system() != "Linux":
        run()
        return float("nan")
    with _returning_memory():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1e3


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Memory that was freed goes back to the system, so that its use shows again.

    That makes allocation slow, and what is timed later must not pay for it: afterwards the
    thresholds are those that glibc arrives at by itself after a few large tensors.
    """
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(M_MMAP_THRESHOLD, 2**16)  # larger tensors get pages of their own
    library.malloc_trim(0)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of the power law cost = c size^p that fits best in logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, costs))
    x = x - x.mean()
    return float((x @ (y - y.mean())) / (x @ x))


def machine(device: str | torch.device) -> str:
    """The device's name, and on a CPU the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _cell(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return "" if cell != cell else f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
