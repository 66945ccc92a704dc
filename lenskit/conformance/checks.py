"""Does everything here mean, on a given model, what it says? Named checks against Hugging Face.

Each check is a function of a loaded model and, where it compares with Hugging Face's own, of
``Readings`` taken from the same weights before they were wrapped. ``lenskit check`` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from lenskit.capture import Attention, Capture, capture
from lenskit.concepts import Concept
from lenskit.conformance.readings import STRENGTH, STRENGTHS, Alone, Readings
from lenskit.generation import end_tokens, generate
from lenskit.models import (
    PATTERN,
    RESID,
    SCORES,
    ModelCheckError,
    Tokens,
    conversation_ids,
    limits_of,
    load_hugging_face,
    load_model,
    load_tokenizer,
    model_fingerprint,
    model_location,
    model_report,
    render,
    special_tokens,
)
from lenskit.prompts import PromptSet, build_prompts
from lenskit.steering import steer
from lenskit.vectors import ConceptVectors

T = TypeVar("T")

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The greatest error, relative to the scale of the values. Half precision rounds differently in
# batches of different shapes, so there it can only be said that nothing is far off.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-2, torch.bfloat16: 1e-1}
PREFIX = "Take on a cheerful mood."
# Of different lengths, so that most of them are padded.
STATEMENTS = (
    "Rain.",
    "Libraries should stay open on Sundays, and nobody should have to pay for them.",
    "The best ideas come in the morning.",
)
QUESTIONS = ("Why?", "What is the scariest thing in the world?", "What do you think of rain?")


@dataclass(frozen=True)
class Result:
    """What one check found.

    ``error``: the greatest difference, relative to the scale of the values (``None`` where
    nothing is measured). ``needed``: whether the library depends on it.
    """

    name: str
    holds: bool
    error: float | None
    meaning: str
    needed: bool = True


def read(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Readings:
    """What the checks compare with, from a model that no bridge has wrapped yet."""
    return Readings.read(hf_model, _prompts(tokenizer), _question_tokens(tokenizer))


def conformance(model: TransformerBridge, readings: Readings | None = None) -> tuple[Result, ...]:
    """Run every check on a loaded model; without ``readings`` those that need none.

    A check that raises does not hold, and says why.
    """
    alone = (
        hooks,
        special_tokens_once,
        candidate_tokens,
        left_padding,
        batch_composition,
        long_prompts,
    )
    checks = [partial(check_one, model) for check_one in alone]
    if readings is not None:
        compared = (captures, steering, steered_generation)
        checks += [partial(compare, model, readings) for compare in compared]
    results: list[Result] = []
    for run in checks:
        results += _attempt(results, run.func.__name__.replace("_", " "), run) or []
    return tuple(results)


def _attempt(results: list[Result], name: str, run: Callable[[], T]) -> T | None:
    """What ``run`` returns; where it raises, whatever that is, a result that does not hold."""
    try:
        return run()
    except Exception as error:
        kind = (
            "" if isinstance(error, ValueError | ModelCheckError) else f"{type(error).__name__}: "
        )
        results.append(Result(name, False, None, f"{kind}{error or 'no reason given'}"))
        return None


def hooks(model: TransformerBridge) -> list[Result]:
    """Which hooks fire in every block, and edits of which change the logits."""
    report = model_report(model)
    results = [Result("hooks fire", True, None, f"in every block: {', '.join(report.fires)}")]
    for hook, needed in ((RESID, True), (SCORES, False), (PATTERN, False)):
        holds = hook in report.edits
        meaning = "change the logits" if holds else "are discarded by TransformerLens"
        results.append(Result(f"edits of {hook}", holds, None, meaning, needed))
    return results


def special_tokens_once(model: TransformerBridge) -> list[Result]:
    """Every special token as often as the template writes it, and BOS not twice."""
    tokenizer, wrong = model.tokenizer, set()
    for question in QUESTIONS:
        conversation = [{"role": "user", "content": question}]
        text = render(tokenizer, conversation)
        ids = conversation_ids(tokenizer, [conversation]).input_ids[0].tolist()
        for name in special_tokens(tokenizer):
            if ids.count(tokenizer.convert_tokens_to_ids(name)) != text.count(name):
                wrong.add(name)
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            wrong.add(tokenizer.bos_token)
    meaning = (
        f"not as in the template: {', '.join(sorted(wrong))}" if wrong else "as in the template"
    )
    return [Result("special tokens", not wrong, None, meaning)]


def candidate_tokens(model: TransformerBridge) -> list[Result]:
    """Prompts end in the same tokens after the user's text, and the prefix is located."""
    candidates = _prompts(model.tokenizer).candidates
    return [Result("candidate tokens", True, None, " ".join(map(repr, candidates)))]


def left_padding(model: TransformerBridge) -> list[Result]:
    """Residuals and logits of a prompt do not depend on the padding before it."""
    error = 0.0
    for row in range(len(QUESTIONS)):
        tokens = _question_tokens(model.tokenizer).rows([row]).trimmed()
        padding = torch.full((1, 7), model.tokenizer.pad_token_id)
        padded = Tokens(
            torch.cat([padding, tokens.input_ids], dim=1),
            torch.cat([torch.zeros_like(padding), tokens.attention_mask], dim=1),
        )
        for alone, ours in zip(_last(model, tokens), _last(model, padded), strict=True):
            error = max(error, _relative(ours, alone))
    return [_measured(model, "left padding", error, "changes nothing")]


def batch_composition(model: TransformerBridge) -> list[Result]:
    """A prompt's capture does not depend on the prompts beside it."""
    prompts = _prompts(model.tokenizer)
    errors = _differences(model, prompts, capture(model, prompts, batch_size=1, progress=False))
    return [_measured(model, "batch composition", max(errors), "changes nothing")]


def long_prompts(model: TransformerBridge) -> list[Result]:
    """Whether there is a length beyond which prompts in a batch would change each other."""
    limits = limits_of(model)
    if limits.longest is None:
        return [Result("long prompts", True, None, "are as independent as short ones", False)]
    meaning = f"up to {limits.longest} tokens; beyond, the batch's length counts ({limits.reason})"
    return [Result("long prompts", False, None, meaning, False)]


def captures(model: TransformerBridge, readings: Readings) -> list[Result]:
    """Captured attention and ``resid_post`` are Hugging Face's own, by hooks and by default.

    ``resid_post`` of the last block is what a PyTorch hook sees that block return (``Alone``).
    """
    eager = _differences(model, readings.prompts, readings.plain, "eager")
    default = _differences(model, readings.prompts, readings.plain)
    attention, resid = map(max, zip(eager, default, strict=True))
    return [
        _measured(model, "attention to the prefix", attention, "equals Hugging Face's patterns"),
        _measured(model, "residual stream", resid, "equals Hugging Face's hidden states"),
    ]


def steering(model: TransformerBridge, readings: Readings) -> list[Result]:
    """Steering a block changes the logits as a plain PyTorch hook does, and no earlier block.

    The error is relative to the change; earlier blocks must be the same to the bit.
    """
    vectors, tokens, error = _vectors(model, readings), readings.prompts.tokens, 0.0
    before = _last(model, tokens)
    for block, theirs in readings.steered.items():
        with steer(model, vectors, coefficient=STRENGTH, blocks=[block], relative=True):
            after = _last(model, tokens)
        if not all(torch.equal(after[i], before[i]) for i in range(block)):
            return [Result("steering", False, None, f"block {block} changes an earlier one")]
        plain = readings.plain.logits
        error = max(error, _relative(after[-1] - plain, theirs - plain))
    return [_measured(model, "steering", error, "changes what a plain PyTorch hook changes")]


def steered_generation(model: TransformerBridge, readings: Readings) -> list[Result]:
    """Cached, padded, batched steered answers are, token for token, the uncached ones alone.

    The error is by how much Hugging Face's logits prefer its own token where ours first differs.
    """
    vectors, error, same = _vectors(model, readings), 0.0, 0
    with steer(model, vectors, coefficient=STRENGTHS, relative=True):
        answers = generate(model, QUESTIONS, max_new_tokens=readings.written.shape[1])
    ends = end_tokens(model)
    for answer, theirs, scores in zip(answers, readings.written, readings.scores, strict=True):
        ours = [*answer.token_ids, *([None] if answer.finished else [])]
        for step, token in enumerate(ours):
            # An answer does not tell which of several end tokens it ended with.
            choice = list(ends) if token is None else [token]
            if int(theirs[step]) not in choice:
                lost = scores[step].max() - scores[step][choice].max()
                error = max(error, (lost / scores[step].abs().max()).item())
                break
            same += 1
    return [_measured(model, "steered generation", error, f"{same} tokens equal uncached ones")]


def check(
    model: str = "lenskit-mini",
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> bool:
    """Run every check on a model by its name, show what holds, and return whether all is well.

    A model that cannot be opened, or not be read, has a row that says why. Raises ``OSError``
    where there is no such folder.
    """
    console = Console()
    with console.status(f"checking {model}"):
        results, title = _examine(model, device=device, dtype=dtype)
    console.print(result_table(results, title))
    return all(result.holds or not result.needed for result in results)


def _examine(model: str, **placing: Any) -> tuple[list[Result], str]:
    """Every result for a model by its name, as far as one gets, and what the model is."""
    place, results = model_location(model), list[Result]()
    attempt = partial(_attempt, results)
    tokenizer = attempt("tokenizer", lambda: load_tokenizer(place))
    if tokenizer is None:
        return results, model
    hf_model = attempt("opens in transformers", lambda: load_hugging_face(model, **placing).eval())
    if hf_model is None:
        return results, model
    readings = attempt("Hugging Face's own values", lambda: read(hf_model, tokenizer))
    title = f"{model} ({type(hf_model).__name__}, {hf_model.dtype})"
    loaded = attempt(
        "opens in TransformerLens",
        lambda: load_model(model, hf_model=hf_model, tokenizer=tokenizer, check=False),
    )
    return [*results, *(conformance(loaded, readings) if loaded else ())], title


def result_table(results: Sequence[Result], title: str = "") -> Table:
    """One row for each check: whether it holds, its error, and what that means."""
    table = Table("check", "holds", Column("error", justify="right"), "meaning", title=title)
    for result in results:
        holds = "yes" if result.holds else "no" if result.needed else "no, not needed"
        error = "" if result.error is None else f"{result.error:.1e}"
        table.add_row(result.name, holds, error, escape(result.meaning))
    return table


def _prompts(tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    return build_prompts(model, PREFIX, layout="paired", statements=STATEMENTS, seed=None)


def _question_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    return conversation_ids(tokenizer, [[{"role": "user", "content": text}] for text in QUESTIONS])


def _vectors(model: TransformerBridge, readings: Readings) -> ConceptVectors:
    norms = readings.directions.norm(dim=1)
    return ConceptVectors(
        directions=readings.directions / norms[:, None],
        validation=torch.zeros_like(norms),
        resid_norm=norms,
        model=model_fingerprint(model),
        concept=Concept(PREFIX),
        learner="random",
        selection="none",
        labels="none",
        data_hash="",
        version="",
    )


@torch.no_grad()
def _last(model: TransformerBridge, tokens: Tokens) -> list[Tensor]:
    """``resid_post`` of every block at the last token, and the logits there."""
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[..., None]:
        def read(resid: Tensor, hook: Any) -> None:
            seen[block] = resid[:, -1].float().cpu()

        return read

    blocks = range(model.cfg.n_layers)
    with model.hooks(fwd_hooks=[(f"blocks.{block}.{RESID}", keep(block)) for block in blocks]):
        tokens = tokens.to(model.cfg.device)
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return [*(seen[block] for block in blocks), logits[:, -1].float().cpu()]


def _differences(
    model: TransformerBridge, prompts: PromptSet, theirs: Capture | Alone, way: Attention = "auto"
) -> tuple[float, float]:
    """How far a capture of all prompts at once is off: attention, and the worst block's stream."""
    ours = capture(model, prompts, batch_size=len(prompts), attention=way, progress=False)
    blocks = zip(ours.resid_post.unbind(1), theirs.resid_post.unbind(1), strict=True)
    attention = _relative(ours.attention_to_prefix, theirs.attention_to_prefix)
    return attention, max(_relative(mine, their) for mine, their in blocks)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _measured(model: TransformerBridge, name: str, error: float, meaning: str) -> Result:
    limit = TOLERANCES.get(model.cfg.dtype, 1e-5)
    if error > limit:
        meaning = f"off by {error:.1e}, more than {limit:.0e}"
    return Result(name, error <= limit, error, meaning)
