"""The ceiling of a recipe: one constant vector, optimised on the answers themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.concepts import Concept
from lenskit.embedded.evaluation.subject import Subject, kept, mean
from lenskit.embedded.grammar import Entry
from lenskit.generation import SteeringRow, generate_steered
from lenskit.scoring import grammar_judge

PAIRS = 5  # paraphrases, each with an answer, in a step
RATE = 0.12  # Adam's, in units of a residual norm spread over all dimensions


def optimised_directions(
    subject: Subject, entry: Entry, norms: Float[Tensor, " block"]
) -> tuple[Float[Tensor, "block d_model"], Float[Tensor, " block"]]:
    """A vector for each of ``scale.blocks`` that makes the concept's answers likely, and its loss.

    Added after its block at all positions of bare paraphrases of the test questions and of the
    answers to them. Blocks are optimised side by side, as rows of one batch. The loss, in nats a
    token of the answer, is the mean of the last quarter of the steps.
    """
    model, scale = subject.plain, subject.scale
    random = Random(f"{subject.seed}/{entry.concept_class}/{entry.name}")
    rules = subject.grammar.classes[entry.concept_class]
    paraphrases = [text for wordings in rules.questions for text in wordings[1:]]
    number, width = len(scale.blocks), model.config.hidden_size
    unit = (norms / width**0.5)[:, None].to(model.device)
    direction = torch.zeros(number, width, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([direction], lr=RATE)
    losses = []

    def add(place: int):
        rows = slice(place * PAIRS, (place + 1) * PAIRS)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            delta = torch.zeros_like(hidden)
            delta[rows] = (direction * unit)[place]
            hidden = hidden + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    layers = model.model.layers
    handles = [
        layers[block].register_forward_hook(add(place)) for place, block in enumerate(scale.blocks)
    ]
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        for _ in range(scale.steps):
            asked = random.sample(paraphrases, PAIRS)
            texts = [subject.grammar.answer(entry, random, most=2) for _ in asked]
            loss = _losses(subject, asked, texts, number)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
            losses.append(loss.detach().cpu())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in needed:
            parameter.requires_grad_(True)
    last = torch.stack(losses[-max(1, scale.steps // 4) :]).mean(0)
    return (direction * unit).detach().cpu(), last


def _losses(
    subject: Subject, asked: list[str], texts: list[str], times: int
) -> Float[Tensor, " block"]:
    """Mean loss of the answers to the questions, for each of the ``times`` copies of them."""
    tokenizer = subject.tokenizer
    conversations = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": text}]
        for q, text in zip(asked, texts, strict=True)
    ]
    prompts = [
        tokenizer.apply_chat_template(c[:1], add_generation_prompt=True, return_dict=True)
        for c in conversations
    ]
    whole = [tokenizer.apply_chat_template(c, return_dict=True) for c in conversations]
    ids = [torch.tensor(each["input_ids"]) for each in whole]
    wanted = [
        torch.arange(len(row)) >= len(p["input_ids"]) for row, p in zip(ids, prompts, strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_token_id)
    target = torch.nn.utils.rnn.pad_sequence(wanted, True)
    # Padding stands on the right, where no real token looks.
    tokens, target = (x.repeat(times, 1).to(subject.plain.device) for x in (tokens, target))
    logits = subject.plain(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    own = loss * target[:, 1:]
    return own.view(times, -1).sum(1) / target[:, 1:].reshape(times, -1).sum(1)


def _of_concept(subject: Subject, concept: Concept) -> dict[str, Any]:
    scale, made = subject.scale, subject.vectors(concept)
    entry = subject.grammar.classes[str(concept.concept_class)].entries[concept.name]
    directions, losses = optimised_directions(subject, entry, made.resid_norm[list(scale.blocks)])
    paraphrases = [
        text
        for wordings in subject.grammar.classes[entry.concept_class].questions
        for text in wordings[1:]
    ]
    candidates = []
    for block, direction in zip(scale.blocks, directions, strict=True):
        alone = torch.zeros_like(made.directions)
        alone[block] = direction
        candidates.append(replace(made, directions=alone, learner="optimised"))
    asked = [*paraphrases, *concept.questions]
    texts = iter(
        generate_steered(
            subject.model,
            [SteeringRow(q, vectors, 1.0) for vectors in candidates for q in asked],
            relative=False,
        )
    )
    rows = [[grammar_judge(concept, q, next(texts)).score for q in asked] for _ in candidates]
    own = [mean(row[: len(paraphrases)]) for row in rows]
    best = max(range(len(rows)), key=lambda i: (own[i], -float(losses[i])))
    direction, block = directions[best], scale.blocks[best]
    return {
        "score": mean(rows[best][len(paraphrases) :]),
        "on paraphrases": own[best],
        "block": block,
        "loss": float(losses[best]),
        "norm": float(direction.norm() / made.resid_norm[block]),
        "cosine": float(torch.cosine_similarity(direction, made.directions[block], dim=0)),
        "by block": {
            str(b): mean(row[len(paraphrases) :]) for b, row in zip(scale.blocks, rows, strict=True)
        },
    }


def optimised(subject: Subject) -> dict[str, Any]:
    """Over concepts: the score on the test questions of a constant vector, trained on paraphrases.

    Its block is chosen on the paraphrases too. ``norm``: in mean residual norms of its block;
    ``cosine``: to the soft covariance of the attention-guided token.
    """
    every = max(1, subject.scale.concepts // subject.scale.optimised)
    everyone = replace(subject, shard=(0, 1)).concepts
    chosen = everyone[::every][: subject.scale.optimised]
    mine = [c for c in chosen if c in subject.concepts]
    rows = [kept(subject.file("optimised", c), partial(_of_concept, subject, c)) for c in mine]
    numbers = ("score", "on paraphrases", "loss", "norm", "cosine")
    return {
        **{name: mean([row[name] for row in rows]) for name in numbers},
        "by block": {
            str(b): mean([row["by block"][str(b)] for row in rows]) for b in subject.scale.blocks
        },
        "n": len(rows),
    }
