"""How the cost grows: with prompts, their length, the model's width and depth, concepts, rows.

    python -m benchmarks.growth --shape tiny --figure figures/growth.png

One size at a time is doubled while the others stay; the exponent p of cost ~ size^p is fitted to
the larger half of the sizes, where fixed costs no longer matter. 1 is linear. Width and depth need
models of their own, so with ``--shape embedded`` they are those of random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import measure
from benchmarks.generation import endless, random_vectors
from lenskit.capture import Capture, capture
from lenskit.concepts import Concept, concepts
from lenskit.figures.style import BLUE, PALE, new_figure, styled
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import soft_labels
from lenskit.models import model_fingerprint
from lenskit.prompts import build_prompts
from lenskit.selector import select_tokens
from lenskit.study.plan import prompts_of_length
from lenskit.vectors import fit_vectors


@dataclass(frozen=True)
class Series:
    """The cost of one part over one size."""

    part: str
    size: str
    target: float
    sizes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def exponent(self) -> float:
        """p over the larger half of the sizes, three at least."""
        last = max(3, len(self.sizes) // 2 + 1)
        return measure.exponent(self.sizes[-last:], self.seconds[-last:])


Case = tuple[float, Callable[[], object]]


def over_prompts(pair: measure.Pair, numbers: list[int]) -> Iterator[Case]:
    """Capture of more prompts."""
    made = build_prompts(pair.model, concepts["fears"]["spiders"], number=max(numbers))
    for number in numbers:
        some = made.rows(range(number))
        yield number, lambda some=some: capture(pair.model, some, progress=False)


def over_lengths(pair: measure.Pair, lengths: list[int]) -> Iterator[Case]:
    """Capture of 16 longer prompts."""
    some = build_prompts(pair.model, concepts["fears"]["spiders"], number=16)
    for length in lengths:
        longer = prompts_of_length(some, length)
        yield length, lambda longer=longer: capture(pair.model, longer, progress=False)


def over_models(
    shape: str, device: str, dtype: str, entry: str, values: list[int]
) -> Iterator[Case]:
    """Capture of 64 prompts by models with another width or depth."""
    for value in values:
        changes = {entry: value}
        if entry == "hidden_size":
            changes |= {"intermediate_size": 3 * value, "num_attention_heads": value // 32}
            changes |= {"num_key_value_heads": value // 64}
        pair = measure.load(shape, device, dtype, **changes)
        made = build_prompts(pair.model, concepts["fears"]["spiders"], number=64)
        yield value, lambda pair=pair, made=made: capture(pair.model, made, progress=False)


def over_width(device: str, widths: list[int]) -> Iterator[Case]:
    """The fit of one block's vector from 400 wider activations."""
    drawn = torch.Generator().manual_seed(0)
    pair = measure.load("embedded", device)
    made = build_prompts(pair.model, concepts["fears"]["spiders"], number=400)
    for width in widths:
        captured = Capture(
            made,
            torch.rand(400, 1, 4, len(made.candidates), generator=drawn)
            * made.has_prefix[:, None, None, None],
            torch.randn(400, 1, len(made.candidates), width, generator=drawn),
            model_fingerprint(pair.model),
        )
        tokens = select_tokens(captured)
        labels = soft_labels(captured, tokens)

        def fit(captured=captured, tokens=tokens, labels=labels) -> None:
            fit_vectors(captured, tokens, labels, learner="rfm", progress=False)

        yield width, fit


def over_concepts(pair: measure.Pair, numbers: list[int]) -> Iterator[Case]:
    """Prompts, capture and fit of more concepts."""
    every = [one for members in concepts.values() for one in members.values()]

    def work(some: list[Concept]) -> None:
        for concept in some:
            made = build_prompts(pair.model, concept, number=40)
            captured = capture(pair.model, made, progress=False)
            tokens = select_tokens(captured)
            labels = soft_labels(captured, tokens, constant="hard")
            fit_vectors(captured, tokens, labels, learner="rfm", progress=False)

    for number in numbers:
        yield number, lambda number=number: work(list(islice(every, number)))


def over_rows(pair: measure.Pair, numbers: list[int]) -> Iterator[Case]:
    """Steered answers of 16 tokens, all rows in one batch."""
    vectors = random_vectors(pair.model)
    questions = concepts["fears"]["spiders"].questions

    def work(number: int) -> None:
        rows = [SteeringRow(questions[i % 5], vectors, 0.01 * i) for i in range(number)]
        with endless(pair.model):
            generate_steered(pair.model, rows, relative=False, max_new_tokens=16, batch_size=number)

    for number in numbers:
        yield number, lambda number=number: work(number)


def run(
    shape: measure.ShapeOption = "tiny",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 3,
    figure: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(
        "figures/growth.png"
    ),
) -> list[measure.Report]:
    """Sizes, seconds and exponents in a table, and drawn."""
    pair = measure.load(shape, device, dtype)
    random = "tiny" if shape == "embedded" else shape

    def doubled(first: int, times: int) -> list[int]:
        return [first * 2**i for i in range(times - 1 if quick else times)]

    base = measure.SHAPES[random]
    cases: list[tuple[Series, Iterator[Case]]] = [
        (Series("capture", "prompts", 1.1), over_prompts(pair, doubled(25, 5))),
        (Series("capture", "tokens of a prompt", 1.5), over_lengths(pair, doubled(32, 6))),
        (
            Series("capture", "d_model", 2.0),
            over_models(
                random, device, dtype, "hidden_size", doubled(max(128, base["hidden_size"] // 8), 4)
            ),
        ),
        (
            Series("capture", "blocks", 1.1),
            over_models(
                random,
                device,
                dtype,
                "num_hidden_layers",
                doubled(max(1, base["num_hidden_layers"] // 8), 4),
            ),
        ),
        (Series("fit", "d_model", 1.1), over_width(device, doubled(256, 6))),
        (Series("prompts, capture, fit", "concepts", 1.1), over_concepts(pair, doubled(1, 4))),
        (Series("generation", "rows of a batch", 1.1), over_rows(pair, doubled(4, 6))),
    ]
    found = []
    for series, some in cases:
        for size, case in some:
            series.sizes.append(size)
            taken = measure.medians({"": case}, pair.device, repeats)
            series.seconds.append(taken[""])
        found.append(series)
    draw(found, figure, f"{pair.name}, {measure.machine(device)}")
    return [table(found, pair.name)]


def table(found: list[Series], name: str) -> measure.Report:
    """Sizes, seconds and exponents."""
    report = measure.Report(
        f"Growth, {name}",
        ("part", "over", "sizes", "seconds", "exponent", "target"),
        note="cost ~ size^p over the larger sizes; 1 is linear.",
    )
    for series in found:
        report.add(
            series.part,
            series.size,
            " ".join(f"{size:g}" for size in series.sizes),
            " ".join(f"{value:.3g}" for value in series.seconds),
            f"{series.exponent:.2f}",
            f"<= {series.target:g}",
        )
    return report


@styled()
def draw(found: list[Series], file: Path, title: str) -> None:
    """One panel for each series, both axes logarithmic, with a line of slope 1."""
    figure, panels = new_figure(11, 5.8, 2, 4)
    for panel, series in zip(panels, found, strict=False):
        first = series.seconds[-1] / series.sizes[-1]
        panel.loglog(series.sizes, [first * size for size in series.sizes], color=PALE, lw=1)
        panel.loglog(series.sizes, series.seconds, marker="o", ms=4, color=BLUE)
        panel.set_title(f"{series.part}:\nexponent {series.exponent:.2f}")
        panel.set_xlabel(series.size)
        panel.set_ylabel("seconds")
        panel.set_xticks(series.sizes, [f"{size:g}" for size in series.sizes], fontsize=8)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_locator(NullLocator())
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    figure.suptitle(f"{title} (pale line: linear growth)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


if __name__ == "__main__":
    measure.command(run)
