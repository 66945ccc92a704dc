"""The ceiling of a recipe: constant vectors found by gradient descent on answers themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit._display import Displayed, by_block
from lenskit.causal.runs import hook_name
from lenskit.decoding import end_tokens
from lenskit.models import Tokens, chat_ids, hooked, pad_left, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Pair: TypeAlias = tuple[str, str]
Pairs: TypeAlias = Sequence[Pair] | Callable[[Random], Sequence[Pair]]

RATE = 0.12  # Adam's, in units of a residual norm spread over all dimensions


@dataclass(frozen=True, repr=False)
class Optimised(Displayed):
    """A vector for each of ``blocks``, found side by side, each as if it were the only one.

    ``directions`` are in the model's own units, not of unit norm. ``losses``: nats a token of the
    answers, the mean of the last quarter of the steps.
    """

    blocks: tuple[int, ...]
    directions: Float[Tensor, "block d_model"]
    losses: Float[Tensor, " block"]

    def _rows(self) -> dict[str, object]:
        return {
            "blocks": ", ".join(map(str, self.blocks)),
            "norms": by_block(f"{each:.3g}" for each in self.directions.norm(dim=-1).tolist()),
            "losses": by_block(f"{each:.3g}" for each in self.losses.tolist()),
        }


def optimise(
    model: TransformerBridge,
    pairs: Pairs,
    resid_norm: Float[Tensor, " layer"],
    *,
    blocks: Sequence[int] | None = None,
    steps: int = 60,
    number: int = 5,
    rate: float = RATE,
    seed: int | str = 0,
) -> Optimised:
    """For each block the constant vector that makes the answers likely when added behind it.

    ``pairs``: questions and answers that show the concept, of which ``number`` are drawn for each
    of the ``steps``, or a function that draws some with the random generator it is given. The
    vector is added at every token of question and answer; the loss is that of the answer and of the
    end token behind it. Adam's ``rate`` is in units of each block's ``resid_norm``, spread over all
    dimensions; every vector begins at zero. All ``blocks`` (by default all) are rows of one batch.

    Such a vector says what one direction can do, whatever recipe finds it: a ceiling. The weights
    stay as they are. Raises ValueError without pairs, and for blocks that the model has not.

    >>> pairs = [("What do you fear?", "Spiders make me shiver.")]
    >>> found = lk.causal.optimise(model, pairs, vectors.resid_norm, blocks=[2], steps=3)
    >>> found.directions.shape == (1, model.cfg.d_model)
    True
    """
    chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
    steps, number = whole("steps", steps, 1), whole("number", number, 1)
    if not callable(pairs) and not len(pairs):
        raise ValueError("pairs is empty; give questions with answers that show the concept")
    random, losses = Random(seed), []
    width, device = model.cfg.d_model, model.cfg.device
    unit = (resid_norm[list(chosen)] / width**0.5)[:, None].to(device)
    direction = torch.zeros(len(chosen), width, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([direction], lr=rate)
    with using(model), torch.enable_grad():
        for _ in range(steps):
            if callable(pairs):
                drawn = list(pairs(random))
            else:
                drawn = random.sample(list(pairs), min(number, len(pairs)))
            tokens, wanted = _tokens(model, drawn)
            loss = _losses(model, chosen, direction * unit, tokens, wanted)
            (direction.grad,) = torch.autograd.grad(loss.sum(), [direction])
            optimiser.step()
            losses.append(loss.detach().cpu())
    last = torch.stack(losses[-max(1, steps // 4) :]).mean(dim=0)
    return Optimised(chosen, (direction * unit).detach().cpu(), last)


def _tokens(
    model: TransformerBridge, pairs: Sequence[Pair]
) -> tuple[Tokens, Bool[Tensor, "row pos"]]:
    """Questions with their answers and an end token, and which of the tokens are the answers'."""
    prompts = chat_ids(model, [[{"role": "user", "content": question}] for question, _ in pairs])
    own, ends = model.tokenizer.eos_token_id, end_tokens(model)
    end = [own] if own in ends else list(ends[:1])
    ids, lengths = [], []
    for row, mask, (_, answer) in zip(
        prompts.input_ids, prompts.attention_mask, pairs, strict=True
    ):
        said = [*model.tokenizer(answer, add_special_tokens=False)["input_ids"], *end]
        ids.append([*row[mask.bool()].tolist(), *said])
        lengths.append(len(said))
    tokens = pad_left(ids, model.tokenizer.pad_token_id)
    places = torch.arange(tokens.input_ids.shape[1], 0, -1)
    return tokens, places <= torch.tensor(lengths)[:, None]


def _losses(
    model: TransformerBridge,
    blocks: Sequence[int],
    added: Float[Tensor, "block d_model"],
    tokens: Tokens,
    wanted: Bool[Tensor, "row pos"],
) -> Float[Tensor, " block"]:
    """Mean loss of the answers for each block, to a copy of the pairs each."""
    times, rows = len(blocks), len(tokens)

    def adder(place: int) -> Callable[..., Tensor]:
        own = torch.zeros(times * rows, 1, 1)
        own[place * rows : (place + 1) * rows] = 1

        def add(value: Tensor, hook: Any) -> Tensor:
            return value + own.to(value) * added[place].to(value)

        return add

    hooks = [(hook_name(block, "resid_post"), adder(i)) for i, block in enumerate(blocks)]
    copies = Tokens(tokens.input_ids.repeat(times, 1), tokens.attention_mask.repeat(times, 1))
    with hooked(model, hooks):
        copies = copies.to(model.cfg.device)
        logits = model(copies.input_ids, attention_mask=copies.attention_mask, use_cache=False)
    asked = wanted[:, 1:].repeat(times, 1).to(logits.device)
    said = copies.input_ids[:, 1:].to(logits.device)[asked]
    # Every copy asks for as many tokens, so that the mean over them is each block's own.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][asked].float(), said, reduction="none")
    return loss.view(times, -1).mean(dim=1)
