"""What a study will cost in memory and time, from a few seconds of the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lenskit.capture import Capture, capture
from lenskit.concepts import concepts
from lenskit.generation import generate
from lenskit.models import Tokens, chat_ids, model_fingerprint, shares, tokens_run
from lenskit.prompts import PromptSet, build_prompts
from lenskit.selector import TokenSelection
from lenskit.study.clock import seconds_of
from lenskit.vectors import fit_vectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# A measurement grows until it takes so long.
_ENOUGH_SECONDS = 1.0
_CAPTURED, _BATCH = 64, 256
# The most prompts that a fit is measured on.
_FITTED = 400
# What a config calls its number of positions, and the longest prompt where it has none.
_POSITIONS, _LONGEST = "max_position_embeddings", 2**17
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The cost of a study: seconds of one concept, and bytes that are held at the same time.

    ``weights``: parameters and buffers. ``captured``: what ``capture`` keeps of one concept, on
    the CPU. ``cache``: keys and values of the largest batch of answers at its last step. The
    working memory of a forward pass comes on top; it falls with the batch size.

    ``failures``: what could not be measured on this model, and why. What depends on it is ``None``.
    """

    model: str
    number_of_concepts: int
    prompts: int
    tokens_per_prompt: int | None
    rows: int
    max_new_tokens: int
    weights: int
    captured: int | None
    cache: int | None
    capture_seconds: float | None
    fit_seconds: float | None
    generation_seconds: float | None
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def memory(self) -> int | None:
        """All bytes together."""
        if self.captured is None or self.cache is None:
            return None
        return self.weights + self.captured + self.cache

    @property
    def seconds_per_concept(self) -> float | None:
        """Capture, fit and generation of one concept."""
        capture, fit, answers = self.capture_seconds, self.fit_seconds, self.generation_seconds
        if capture is None or fit is None or answers is None:
            return None
        return capture + fit + answers

    @property
    def seconds(self) -> float | None:
        """All concepts, one after the other."""
        one = self.seconds_per_concept
        return None if one is None else self.number_of_concepts * one


def plan(
    model: TransformerBridge,
    number_of_concepts: int = 1,
    prompts: int = 400,
    tokens_per_prompt: int | None = None,
    rows: int = 40,
    max_new_tokens: int = 50,
    *,
    learner: Any | None = None,
) -> Plan:
    """Estimate a study of so many concepts before it is run; takes a few seconds itself.

    ``prompts``: those captured for one concept. ``tokens_per_prompt``: their mean length, by
    default that of the grammar's. ``rows``: answers generated for one concept (questions times
    coefficients), in batches of 256, each of ``max_new_tokens``: answers that end earlier cost
    less. ``learner`` as in ``fit_vectors``; one vector for each block is fitted.

    Bytes are exact. Seconds are measured on a small batch, on random activations and on a short
    generation, and extrapolated in proportion to prompts, blocks, rows and tokens; those of a fit
    to more than 400 prompts by how they grow up to there.

    A part that cannot be run on this model is among the plan's ``failures``. Raises ``ValueError``
    for numbers below 1, fewer than 4 prompts, and prompts longer than the model's positions.
    """
    counts = {
        "number_of_concepts": number_of_concepts,
        "rows": rows,
        "max_new_tokens": max_new_tokens,
    }
    if low := [f"{name}={count}" for name, count in counts.items() if count < 1]:
        raise ValueError(f"a plan needs at least one of each; got {', '.join(low)}")
    if prompts < 4:
        raise ValueError(
            f"prompts must be at least 4, the fewest that can be fitted; got {prompts}"
        )
    positions = getattr(model.original_model.config.get_text_config(), _POSITIONS, _LONGEST)
    if tokens_per_prompt is not None and tokens_per_prompt > positions:
        raise ValueError(
            f"tokens_per_prompt must be at most {positions}, what this model has positions for; "
            f"got {tokens_per_prompt}"
        )
    concept = next(iter(next(iter(concepts.values())).values()))
    failures: list[tuple[str, str]] = []

    def attempt(part: str, run: Callable[[], T]) -> T | None:
        try:
            return run()
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            failures.append((part, f"{kind}{error or 'no reason given'}"))
            return None

    some = attempt("prompts", lambda: build_prompts(model, concept, number=64))
    captured = capture_seconds = fit_seconds = None
    if some is not None:
        if tokens_per_prompt is not None:
            some = prompts_of_length(some, tokens_per_prompt)
        made, cfg = some, model.cfg
        tokens_per_prompt = round(made.tokens.lengths.float().mean().item())
        entries = prompts * cfg.n_layers * len(made.candidates) * (cfg.d_model + cfg.n_heads)
        captured = entries * torch.float32.itemsize
        capture_seconds = attempt("capture", lambda: prompts * _capture_seconds(model, made))
        fit_seconds = attempt(
            "fit", lambda: cfg.n_layers * _fit_seconds(model, made, prompts, learner)
        )
    questions = [concept.questions[i % len(concept.questions)] for i in range(min(rows, _BATCH))]
    return Plan(
        model_fingerprint(model),
        number_of_concepts,
        prompts,
        tokens_per_prompt,
        rows,
        max_new_tokens,
        weights=_storage([*model.parameters(), *model.buffers()]),
        captured=captured,
        cache=attempt("cache", lambda: _cache_bytes(model, questions, max_new_tokens)),
        capture_seconds=capture_seconds,
        fit_seconds=fit_seconds,
        generation_seconds=attempt(
            "generation", lambda: rows * _generation_seconds(model, questions, max_new_tokens)
        ),
        failures=tuple(failures),
    )


def plan_table(estimate: Plan) -> Table:
    """The plan for the terminal."""
    table = Table("", "one concept", f"{estimate.number_of_concepts} concepts")
    for column in table.columns[1:]:
        column.justify = "right"
    length = (
        "" if estimate.tokens_per_prompt is None else f" of {estimate.tokens_per_prompt} tokens"
    )
    parts = {
        f"capture, {estimate.prompts} prompts{length}": estimate.capture_seconds,
        "fit, all blocks": estimate.fit_seconds,
        f"generation, {estimate.rows} answers of {estimate.max_new_tokens} tokens": (
            estimate.generation_seconds
        ),
        "time": estimate.seconds_per_concept,
    }
    for name, seconds in parts.items():
        table.add_row(
            name,
            *(
                "–" if seconds is None else _duration(seconds * n)
                for n in (1, estimate.number_of_concepts)
            ),
            end_section=name == "time" or name.startswith("generation"),
        )
    for name in ("weights", "captured", "cache", "memory"):
        number = getattr(estimate, name)
        size = "–" if number is None else _size(number)
        table.add_row(name, size, size, end_section=name in ("cache", "memory"))
    return table


def failure_table(estimate: Plan) -> Table:
    """What does not hold on this model, and why."""
    table = Table("does not hold", "because")
    for part, reason in estimate.failures:
        table.add_row(part, escape(reason))
    return table


def prompts_of_length(prompts: PromptSet, length: int) -> PromptSet:
    """Prompts of one length: the text before the closing tokens is cut off or repeated."""
    closing = len(prompts.candidates)
    if length <= closing:
        raise ValueError(
            f"tokens_per_prompt must be more than the {closing} closing tokens of the template, "
            f"got {length}"
        )
    ids, masks = [], []
    for row in range(len(prompts)):
        real = prompts.tokens.attention_mask[row].bool()
        text, mask = prompts.tokens.input_ids[row, real], prompts.prefix_mask[row, real]
        times = -(-length // (len(text) - closing))
        ids.append(torch.cat([text[:-closing].repeat(times)[: length - closing], text[-closing:]]))
        masks.append(torch.cat([mask, mask.new_zeros(length)])[:length])
    tokens = torch.stack(ids)
    return replace(
        prompts,
        tokens=Tokens(tokens, torch.ones_like(tokens)),
        prefix_mask=torch.stack(masks),
    )


def _storage(tensors: list[Tensor]) -> int:
    """Bytes of the tensors, those shared by several counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _cache_bytes(model: TransformerBridge, questions: list[str], max_new_tokens: int) -> int:
    tokens = chat_ids(model, [[{"role": "user", "content": text}] for text in questions])
    # The last token written is never fed back.
    length = tokens.input_ids.shape[1] + max_new_tokens - 1
    one = tokens.rows([0]).trimmed().to(model.cfg.device)
    with torch.no_grad():
        output = model.original_model(input_ids=one.input_ids, use_cache=True)
    size = 0
    for layer in getattr(output.past_key_values, "layers", ()):
        window = getattr(layer, "sliding_window", None)
        kept = length if window is None else min(length, window - 1)
        for part in (layer.keys, layer.values):
            size += part.nbytes // part.shape[-2] * kept
    return size * len(questions)


def _capture_seconds(model: TransformerBridge, some: PromptSet) -> float:
    """Seconds of one prompt."""

    def run(number: int) -> None:
        capture(model, some.rows(range(number)), batch_size=_CAPTURED, progress=False)

    def tokens(number: int) -> int:
        # Few prompts share less of what they begin with.
        rows, places = some.tokens.rows(range(number)), len(some.candidates)
        return tokens_run(rows, _CAPTURED, places, shared=shares(model))

    run(2)  # the first capture tries what attention the model can run
    seconds, number = _grown(model, run, len(some))
    return seconds / tokens(number) * tokens(len(some)) / len(some)


def _fit_seconds(
    model: TransformerBridge, some: PromptSet, prompts: int, learner: Any | None
) -> float:
    """Seconds of one block, on rows drawn at random."""
    number = min(prompts, _FITTED)
    seconds = _seconds_of_a_fit(model, some, number, learner)
    if number == prompts:
        return seconds
    half = _seconds_of_a_fit(model, some, number // 2, learner)
    exponent = min(max(math.log2(seconds / half), 1.0), 3.0)
    return seconds * (prompts / number) ** exponent


def _seconds_of_a_fit(
    model: TransformerBridge, some: PromptSet, number: int, learner: Any | None
) -> float:
    drawn = torch.Generator().manual_seed(0)
    places = len(some.candidates)
    made = Capture(
        some.rows([i % len(some) for i in range(number)]),
        torch.zeros(number, 1, model.cfg.n_heads, places),
        torch.randn(number, 1, places, model.cfg.d_model, generator=drawn),
        model_fingerprint(model),
    )
    tokens = TokenSelection(torch.tensor([places - 1]), some.candidates, "token -1")
    labels = torch.rand(number, 1, generator=drawn)
    return seconds_of(
        lambda: fit_vectors(made, tokens, labels, learner=learner, progress=False),
        model.cfg.device,
    )


def _generation_seconds(
    model: TransformerBridge, questions: list[str], max_new_tokens: int
) -> float:
    """Seconds of one answer, from a few rows that write a few tokens and a few more."""
    steps = [2, 6]
    found: dict[int, tuple[float, int]] = {}

    def run(number: int, tokens: int = steps[0]) -> None:
        answers = generate(model, questions[:number], max_new_tokens=tokens)
        # An answer may end before all tokens are written.
        found[tokens] = 0.0, max(len(each.token_ids) + each.finished for each in answers)

    run(1)
    few, number = _grown(model, run, len(questions))
    more = seconds_of(lambda: run(number, steps[1]), model.cfg.device)
    written = [found[tokens][1] for tokens in steps]
    step = max(more - few, 0.0) / max(written[1] - written[0], 1)
    prefill = max(few - step * written[0], 0.0)
    return (prefill + step * max_new_tokens) / number


def _grown(model: TransformerBridge, run: Callable[[int], None], largest: int) -> tuple[float, int]:
    """Seconds of ``run(number)``, and the number, four times greater until enough time passes."""
    number = min(4, largest)
    while True:
        seconds = seconds_of(partial(run, number), model.cfg.device)
        if seconds >= _ENOUGH_SECONDS or number == largest:
            return seconds, number
        number = min(4 * number, largest)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(number: int) -> str:
    for unit, length in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"
