"""A plain implementation of the published procedure, and how long its parts take.

    python -m benchmarks.plain --shape embedded --quick

Written from the description of attention-guided steering alone (arXiv 2602.00333), with nothing of
lenskit but the prompts: one prompt at a time; one pass for the hidden states, and for prompts with
a prefix one more, eager, that returns all attention patterns; the Recursive Feature Machine on
d x d matrices with an iterative eigensolver; one call of ``generate`` for each coefficient and
question, with plain hooks, on a Hugging Face model. The other benchmarks compare with it.

``--share`` runs a part of the prompts, blocks and answers, and scales their time up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import measure
from benchmarks.generation import plain_answer
from benchmarks.rfm import dense_fit
from lenskit.concepts import Concept, concepts
from lenskit.prompts import PromptSet, build_prompts
from lenskit.study.clock import seconds_of

COEFFICIENTS = tuple(0.02 * i for i in range(1, 9))
MAX_NEW_TOKENS = 50


@dataclass(frozen=True)
class PlainCapture:
    """Attention to the prefix ``[prompt, layer, head, candidate]``, and hidden states.

    The last block's hidden state is, as Hugging Face returns it, the one after the final norm.
    """

    attention: Tensor
    states: Tensor


@torch.no_grad()
def plain_capture(plain: Any, prompts: PromptSet) -> PlainCapture:
    """One prompt at a time: a pass for hidden states, a pass for attention to the prefix."""
    places = len(prompts.candidates)
    attention, states = [], []
    for row in range(len(prompts)):
        real = prompts.tokens.attention_mask[row].bool()
        ids = prompts.tokens.input_ids[row, real][None].to(plain.device)
        prefix = prompts.prefix_mask[row, real].to(plain.device)
        plain.set_attn_implementation("sdpa")
        hidden = plain(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
        states.append(torch.stack([state[0, -places:].float().cpu() for state in hidden]))
        if not bool(prefix.any()):
            shape = (plain.config.num_hidden_layers, plain.config.num_attention_heads, places)
            attention.append(torch.zeros(shape))
            continue
        plain.set_attn_implementation("eager")
        patterns = plain(ids, output_attentions=True, use_cache=False).attentions
        rows = [p[0, :, -places:, prefix].float().sum(-1).cpu() for p in patterns]
        attention.append(torch.stack(rows))
    plain.set_attn_implementation("sdpa")
    return PlainCapture(torch.stack(attention), torch.stack(states))


def plain_vectors(captured: PlainCapture, blocks: int | None = None) -> Tensor:
    """Token by attention, soft labels and a Recursive Feature Machine, one block after another."""
    mean = captured.attention.mean(dim=2)
    vectors = []
    for layer in range(mean.shape[1])[:blocks]:
        token = int(mean[:, layer].amax(dim=0).argmax())
        labels = mean[:, layer, token]
        labels = (labels - labels.min()) / (labels.max() - labels.min())
        rows = captured.states[:, layer, token]
        rows = rows / rows.norm(dim=1, keepdim=True)
        vector, _ = dense_fit(rows.double(), labels.double())
        sign = torch.sign(
            (rows.double() @ vector - (rows.double() @ vector).mean()) @ labels.double()
        )
        vectors.append((sign * vector).float())
    return torch.stack(vectors)


def plain_answers(
    model: Any,
    plain: Any,
    concept: Concept,
    vectors: Tensor,
    coefficients: tuple[float, ...] = COEFFICIENTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """One generation for each coefficient and question; ``model`` lends its tokenizer."""
    additions = [(c * vectors).to(plain.device, plain.dtype) for c in coefficients]
    return [
        plain_answer(model, plain, question, addition, max_new_tokens)
        for addition in additions
        for question in concept.questions
    ]


def plain_seconds(
    pair: measure.Pair, concept: Concept, prompts: PromptSet, share: float = 1.0
) -> dict[str, float]:
    """Seconds of capture, fit and generation; of a share of each, scaled up."""
    layers = pair.plain.config.num_hidden_layers
    captured: list[PlainCapture] = []
    vectors = torch.zeros(layers, pair.plain.config.hidden_size)

    # Halves of pairs stay together, so that both kinds of prompts are there.
    some = prompts.rows(range(max(2, 2 * round(share * len(prompts) / 2))))
    blocks = max(1, round(share * layers))
    coefficients = COEFFICIENTS[: max(1, round(share * len(COEFFICIENTS)))]

    taken = {
        "capture": seconds_of(lambda: captured.append(plain_capture(pair.plain, some)), pair.device)
        * len(prompts)
        / len(some)
    }
    whole = _tiled(captured[0], len(prompts))
    taken["fit"] = seconds_of(lambda: plain_vectors(whole, blocks), pair.device) * layers / blocks
    taken["generation"] = (
        seconds_of(
            lambda: plain_answers(pair.model, pair.plain, concept, vectors, coefficients),
            pair.device,
        )
        * len(COEFFICIENTS)
        / len(coefficients)
    )
    return taken


def _tiled(captured: PlainCapture, prompts: int) -> PlainCapture:
    """As many rows as there are prompts, made of those captured, none twice the same."""
    if prompts == len(captured.states):
        return captured
    index = torch.arange(prompts) % len(captured.states)
    drawn = torch.Generator().manual_seed(0)
    states = captured.states[index]
    noise = torch.randn(states.shape, generator=drawn) * states.std()
    attention = captured.attention[index]
    scale = torch.rand(prompts, 1, 1, 1, generator=drawn)
    return PlainCapture(attention * scale, states + noise)


def run(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    prompts: Annotated[int, typer.Option(help="Prompts of the concept.")] = 400,
    share: Annotated[float, typer.Option(help="Of prompts, blocks and answers to run.")] = 1.0,
) -> list[measure.Report]:
    """The seconds of each part."""
    pair = measure.load(shape, device, dtype)
    concept = concepts["fears"]["spiders"]
    share = min(share, 0.1) if quick else share
    made = build_prompts(pair.model, concept, number=prompts)
    taken = plain_seconds(pair, concept, made, share)
    report = measure.Report(
        f"The procedure as published, {pair.name}, {prompts} prompts", ("part", "seconds")
    )
    for name, value in [*taken.items(), ("all", sum(taken.values()))]:
        report.add(name, value)
    return [report]


if __name__ == "__main__":
    measure.command(run)
