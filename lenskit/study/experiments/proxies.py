"""What might tell of each prompt whether the concept is active in it, and what does tell."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.attention import AttentionEdit, Knockout, Span, edited
from lenskit.concepts import statement_prompt
from lenskit.generation import generate
from lenskit.labels import true_activity
from lenskit.models import ModelCheckError, in_batches, run_plain, using
from lenskit.prompts import PromptSet
from lenskit.scoring import as_verdict
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.setting import Setting
from lenskit.study.ways import Variant

BATCH = 64


def truths(bench: Bench, setting: Setting) -> dict[str, Float[Tensor, " prompt"]]:
    """How active the concept is in each prefixed prompt of the paired capture, by every account.

    "true activity" where the truth is known; "shown in the answer": the judge's score of the
    model's own answer to the prompt.
    """
    prompts = bench.paired.prompts
    own = prompts.rows(prompts.has_prefix)
    asked = [statement_prompt(each) for each in own.statements]
    with_prefix = [statement_prompt(each, bench.concept.prefix) for each in own.statements]
    answers = generate(
        bench.model,
        with_prefix,
        max_new_tokens=setting.max_new_tokens,
        batch_size=setting.batch_size,
    )
    scores = [
        as_verdict(setting.judge(bench.concept, question, answer)).score
        for question, answer in zip(asked, answers, strict=True)
    ]
    known = {"true activity": true_activity(own)} if setting.exact else {}
    return known | {"shown in the answer": torch.tensor(scores, dtype=torch.float64)}


def projections(bench: Bench) -> Float[Tensor, "prompt layer"]:
    """Each prefixed prompt's projection on the concept vector, at the attention-guided token.

    The vector is learnt from hard labels of other prompts, so that it has seen no activity.
    """
    vectors = bench.vectors(Variant("attention", "hard"))
    assert vectors is not None
    capture = bench.paired
    rows = bench.selection("attention").take(capture.resid_post[capture.prompts.has_prefix])
    return (torch.nn.functional.normalize(rows, dim=-1) * vectors.directions).sum(dim=-1)


def single_numbers(bench: Bench) -> Mapping[str, Float[Tensor, " prompt"]]:
    """What one number a prompt says: how far the prefix moves the next token, and its attention.

    KL(with the prefix ‖ without it) of the next token, and KL(whole ‖ knocked out) where no token
    behind the prefix may attend to it; the latter where the model's attention can be edited.
    """
    prompts, model = bench.paired.prompts, bench.model
    own = prompts.has_prefix.nonzero()[:, 0]
    plain = next_log_probs(model, prompts)
    found = {"divergence without prefix": _kl(plain[own], plain[prompts.pair[own]])}
    try:
        cut = next_log_probs(model, prompts.rows(own), knocked_out=True)
    except ModelCheckError:
        return found  # this model's attention cannot be edited
    return found | {"divergence, prefix knocked out": _kl(plain[own], cut)}


@torch.no_grad()
def next_log_probs(
    model: TransformerBridge, prompts: PromptSet, *, knocked_out: bool = False
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities of each prompt's next token, with or without attention to the prefix."""
    hf_model: Any = model.original_model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        options["logits_to_keep"] = 1
    edits = _knockouts(prompts) if knocked_out else []
    found: list[Tensor] = [torch.empty(0)] * len(prompts)

    def run(rows: Tensor) -> None:
        batch = prompts.tokens.rows(rows).trimmed()
        cut = edited(model, [edits[row] for row in rows.tolist()]) if edits else nullcontext()
        with cut:
            logits = run_plain(hf_model, batch, **options).logits[:, -1]
        for row, own in zip(rows.tolist(), logits.float().log_softmax(dim=-1).cpu(), strict=True):
            found[row] = own

    with using(model):
        in_batches(prompts.tokens, BATCH, run, progress=False, description="Next tokens")
    return torch.stack(found)


def _knockouts(prompts: PromptSet) -> Sequence[AttentionEdit]:
    """Cuts between the prefix and what comes behind it; inside it every query keeps its keys."""
    edits = []
    for ids, mask, prefix in zip(
        prompts.tokens.input_ids, prompts.tokens.attention_mask, prompts.prefix_mask, strict=True
    ):
        real = mask.bool()
        places = tuple(prefix[real].nonzero()[:, 0].tolist())
        span = Span(places, tuple(ids[real].tolist()))
        edits.append(AttentionEdit(span, Knockout(), start=places[-1] + 1))
    return edits


def _kl(
    p: Float[Tensor, "prompt vocab"], q: Float[Tensor, "prompt vocab"]
) -> Float[Tensor, " prompt"]:
    chances = p.exp()
    return torch.where(chances > 0, chances * (p - q), 0.0).sum(dim=-1)
