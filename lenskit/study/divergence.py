"""How far steering moves a model: the divergence from its unsteered next tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed, count, quoted
from lenskit.concepts import statement_prompt, statements
from lenskit.generation import Answer, generate
from lenskit.intervention import Positions, intervene, window
from lenskit.models import chat_ids, in_batches, pad_left, run_plain, using
from lenskit.operations import Operation, find_operations
from lenskit.steering import intervention

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.steering import Operations
    from lenskit.vectors import Vectors

T = TypeVar("T")
_QUESTIONS = 8


@dataclass(frozen=True, repr=False)
class Unsteered(Displayed):
    """Unsteered answers to some questions, and what the model expected next along each of them.

    ``ids``: the tokens of each prompt with its answer; ``lengths``: those of the prompt alone.
    ``log_probs``: the log-probabilities of the next token, from the prompt's last token on, float32
    on the CPU; its end token counts where the answer came to its end.
    """

    questions: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    lengths: tuple[int, ...] = field(repr=False)
    log_probs: tuple[Float[Tensor, "token vocab"], ...] = field(repr=False)

    def _headline(self) -> str:
        return f"Unsteered answers to {count(len(self.questions), 'question')}"

    def _rows(self) -> dict[str, object]:
        tokens = sum(len(each) for each in self.log_probs)
        return {"questions": quoted(self.questions), "tokens": f"{tokens} expected"}


def neutral_questions(number: int = _QUESTIONS) -> tuple[str, ...]:
    """So many questions that ask for no concept: about general statements kept from all prompts."""
    every = statements("held_out")
    number = whole("number", number, 1, len(every))
    return tuple(statement_prompt(every[i * len(every) // number]) for i in range(number))


def unsteered(
    model: TransformerBridge,
    questions: Iterable[str] | None = None,
    *,
    max_new_tokens: int = 30,
    batch_size: int = 64,
) -> Unsteered:
    """Greedy answers of the model as it is, and its next-token log-probabilities along them.

    ``questions``: by default ``neutral_questions()``. Call it outside ``steer`` and ``attend``.
    """
    asked = neutral_questions() if questions is None else tuple(questions)
    if not asked or isinstance(questions, str):
        raise ValueError(f"questions must be a list of at least one text, got {questions!r}")
    whole("max_new_tokens", max_new_tokens, 1)
    answers = generate(model, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    plain = followed(model, asked, answers)
    expected = log_probs_along(model, plain, batch_size, read=lambda row, own: own)
    return Unsteered(asked, plain.ids, plain.lengths, tuple(expected))


def followed(
    model: TransformerBridge, questions: Sequence[str], answers: Sequence[Answer]
) -> Unsteered:
    """Questions with answers behind them, whoever wrote these; nothing is expected yet."""
    prompts = chat_ids(model, [[{"role": "user", "content": each}] for each in questions])
    ids, lengths = [], []
    for own, mask, answer in zip(prompts.input_ids, prompts.attention_mask, answers, strict=True):
        prompt = own[mask.bool()].tolist()
        # What is expected behind the last token counts where the model did end there.
        written = answer.token_ids if answer.finished else answer.token_ids[:-1]
        ids.append((*prompt, *written))
        lengths.append(len(prompt))
    return Unsteered(tuple(questions), tuple(ids), tuple(lengths), ())


def divergence(
    model: TransformerBridge,
    base: Unsteered,
    vectors: Sequence[Vectors],
    coefficients: Sequence[float],
    positions: Sequence[Positions] | Positions = "all",
    *,
    operations: Operations = "add",
    relative: bool | None = None,
    batch_size: int = 64,
) -> Float[Tensor, " way"]:
    """Mean KL(unsteered ‖ steered) of the next token along the unsteered answers, in nats a token.

    A number for each of ``vectors`` with its coefficient, positions and operation
    (``SteeringRow``); each question counts alike. ``inf`` where the steered model excludes what the
    other expects, NaN where its logits are not numbers. Each way costs a forward pass for each
    question.
    """
    where = [positions] * len(vectors) if isinstance(positions, str) else list(positions)
    if not len(vectors) == len(coefficients) == len(where):
        raise ValueError(
            f"vectors, coefficients and positions must be as many, got {len(vectors)}, "
            f"{len(coefficients)} and {len(where)}"
        )
    done = each_operation(operations, len(vectors))
    number = len(base.questions)
    steered = [
        way for way in zip(vectors, coefficients, where, done, strict=True) for _ in range(number)
    ]
    if not steered:
        return torch.empty(0)

    def moved(row: int, log_probs: Float[Tensor, "token vocab"]) -> float:
        return _kl(base.log_probs[row % number], log_probs)

    found = log_probs_along(model, base, batch_size, steered, relative, read=moved)
    return torch.tensor(found).view(-1, number).mean(dim=1)


def each_operation(operations: Operations, number: int) -> tuple[Operation, ...]:
    """The operation of each way; one is shared by all. ValueError for another number of them."""
    found = find_operations(operations)
    if len(found) not in (1, number):
        raise ValueError(f"operations must be one, or {number} as the vectors, got {len(found)}")
    return found * number if len(found) == 1 else found


def _kl(p: Float[Tensor, "token vocab"], q: Float[Tensor, "token vocab"]) -> float:
    """KL(p ‖ q) of log-probabilities, the mean over tokens, in nats."""
    chances = p.exp()
    gained = torch.where(chances > 0, chances * (p - q), 0.0)
    return float(gained.sum(dim=-1).mean())


@torch.no_grad()
def log_probs_along(
    model: TransformerBridge,
    base: Unsteered,
    batch_size: int,
    steered: Sequence[tuple[Vectors, float, Positions, Operation]] = (),
    relative: bool | None = None,
    *,
    read: Callable[[int, Float[Tensor, "token vocab"]], T],
) -> list[T]:
    """What ``read(row, log_probs)`` makes of each row's next-token log-probabilities.

    They begin at the prompt's last token, in float32 on the CPU, and are not kept: of a large
    vocabulary they would not fit. ``base``: whose own ``log_probs`` are not used. ``steered``: what
    is added in each row, whose questions take turns; nothing by default.
    """
    number, rows = len(base.ids), len(steered) or len(base.ids)
    tokens = pad_left([base.ids[row % number] for row in range(rows)], model.tokenizer.pad_token_id)
    lengths = [base.lengths[row % number] for row in range(rows)]
    hf_model: Any = model.original_model
    found: dict[int, T] = {}

    def run(index: Tensor) -> None:
        batch, own = tokens.rows(index).trimmed(), index.tolist()
        counts = [int(tokens.lengths[row]) - lengths[row] + 1 for row in own]
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
            options["logits_to_keep"] = max(counts)
        if not steered:
            logits = run_plain(hf_model, batch, **options).logits
        else:
            planned = intervention(
                model,
                [steered[row][0] for row in own],
                [steered[row][1] for row in own],
                relative=relative,
                windows=[window(steered[row][2], lengths[row]) for row in own],
                operation=[steered[row][3] for row in own],
            )
            with intervene(model, planned):
                logits = run_plain(hf_model, batch, **options).logits
        for row, kept, each in zip(own, counts, logits, strict=True):
            found[row] = read(row, each[-kept:].float().log_softmax(dim=-1).cpu())

    with using(model):
        in_batches(tokens, batch_size, run, progress=False, description="Measuring divergence")
    return [found[row] for row in range(rows)]
