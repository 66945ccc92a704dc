"""What a study will cost in memory and time, from a few seconds of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
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


@dataclass(frozen=True)
class Plan:
    """The cost of a study: seconds of one concept, and bytes that are held at the same time.

    ``weights``: parameters and buffers. ``captured``: what ``capture`` keeps of one concept, on
    the CPU. ``cache``: keys and values of the largest batch of answers at its last step. The
    working memory of a forward pass comes on top; it falls with the batch size.
    """

    model: str
    number_of_concepts: int
    prompts: int
    tokens_per_prompt: int
    rows: int
    max_new_tokens: int
    weights: int
    captured: int
    cache: int
    capture_seconds: float
    fit_seconds: float
    generation_seconds: float

    @property
    def memory(self) -> int:
        """All bytes together."""
        return self.weights + self.captured + self.cache

    @property
    def seconds_per_concept(self) -> float:
        """Capture, fit and generation of one concept."""
        return self.capture_seconds + self.fit_seconds + self.generation_seconds

    @property
    def seconds(self) -> float:
        """All concepts, one after the other."""
        return self.number_of_concepts * self.seconds_per_concept


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
    generation, and extrapolated in proportion to prompts, blocks, rows and tokens.

    Raises ``ValueError`` for numbers below 1, and fewer than 4 prompts.
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
    concept = next(iter(next(iter(concepts.values())).values()))
    some = build_prompts(model, concept, number=64)
    if tokens_per_prompt is None:
        tokens_per_prompt = round(some.tokens.lengths.float().mean().item())
    else:
        some = prompts_of_length(some, tokens_per_prompt)

    cfg, candidates = model.cfg, len(some.candidates)
    entries = prompts * cfg.n_layers * candidates * (cfg.d_model + cfg.n_heads)
    questions = [concept.questions[i % len(concept.questions)] for i in range(rows)]
    return Plan(
        model_fingerprint(model),
        number_of_concepts,
        prompts,
        tokens_per_prompt,
        rows,
        max_new_tokens,
        weights=_storage([*model.parameters(), *model.buffers()]),
        captured=entries * torch.float32.itemsize,
        cache=_cache_bytes(model, questions[:_BATCH], max_new_tokens),
        capture_seconds=_capture_seconds(model, some) * prompts,
        fit_seconds=_fit_seconds(model, some, prompts, learner) * cfg.n_layers,
        generation_seconds=_generation_seconds(model, questions, max_new_tokens),
    )


def plan_table(estimate: Plan) -> Table:
    """The plan for the terminal."""
    table = Table("", "one concept", f"{estimate.number_of_concepts} concepts")
    for column in table.columns[1:]:
        column.justify = "right"
    parts = {
        f"capture, {estimate.prompts} prompts of {estimate.tokens_per_prompt} tokens": (
            estimate.capture_seconds
        ),
        "fit, all blocks": estimate.fit_seconds,
        f"generation, {estimate.rows} answers of {estimate.max_new_tokens} tokens": (
            estimate.generation_seconds
        ),
        "time": estimate.seconds_per_concept,
    }
    for name, seconds in parts.items():
        table.add_row(
            name,
            _duration(seconds),
            _duration(seconds * estimate.number_of_concepts),
            end_section=name == "time" or name.startswith("generation"),
        )
    for name in ("weights", "captured", "cache", "memory"):
        size = _size(getattr(estimate, name))
        table.add_row(name, size, size, end_section=name == "cache")
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
    drawn = torch.Generator().manual_seed(0)
    places = len(some.candidates)
    rows = some.rows([i % len(some) for i in range(prompts)])
    made = Capture(
        rows,
        torch.zeros(prompts, 1, model.cfg.n_heads, places),
        torch.randn(prompts, 1, places, model.cfg.d_model, generator=drawn),
        model_fingerprint(model),
    )
    tokens = TokenSelection(torch.tensor([places - 1]), some.candidates, "token -1")
    labels = torch.rand(prompts, 1, generator=drawn)
    return seconds_of(
        lambda: fit_vectors(made, tokens, labels, learner=learner, progress=False),
        model.cfg.device,
    )


def _generation_seconds(
    model: TransformerBridge, questions: list[str], max_new_tokens: int
) -> float:
    """Seconds of all answers, from a few rows that write a few tokens and a few more."""
    steps = [2, 6]
    found: dict[int, tuple[float, int]] = {}

    def run(number: int, tokens: int = steps[0]) -> None:
        answers = generate(model, questions[:number], max_new_tokens=tokens)
        # An answer may end before all tokens are written.
        found[tokens] = 0.0, max(len(each.token_ids) + each.finished for each in answers)

    run(1)
    few, number = _grown(model, run, min(len(questions), _BATCH))
    more = seconds_of(lambda: run(number, steps[1]), model.cfg.device)
    written = [found[tokens][1] for tokens in steps]
    step = max(more - few, 0.0) / max(written[1] - written[0], 1)
    prefill = max(few - step * written[0], 0.0)
    return (prefill + step * max_new_tokens) * len(questions) / number


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
