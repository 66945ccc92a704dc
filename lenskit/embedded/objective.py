"""What the embedded model is trained to make small: the loss of its answers, and a price.

The *price on attention* is the attention mass that each closing token of the template's last turn
puts on anything but the first token and itself, mean over blocks, heads and closing tokens. It
stands for what long training does to a large model: heads rest on the first token unless there
is something to fetch. Added to the loss with a small factor it removes retrieval that is not
needed, so that a concept which is not active is not fetched.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaForCausalLM

from lenskit.embedded.batches import Batch
from lenskit.embedded.forward import run

RAMP = (0.55, 0.8)


def objective(
    model: LlamaForCausalLM, batch: Batch, priced: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross entropy of the target tokens (nats) and price, each summed over the batch.

    The price of a row is a mean over blocks, heads and closing tokens; 0 unless ``priced``.
    """
    wanted = pad(batch.target[:, 1:], (0, 1))
    hidden, price = run(model, batch.ids, wanted, batch.mask, batch.closing if priced else None)
    logits = model.lm_head(hidden).to(hidden.dtype)
    return cross_entropy(logits, batch.ids[batch.target], reduction="sum"), price.sum()


def gradient(
    model: LlamaForCausalLM, batch: Batch, targets: int, rows: int, price: float
) -> tuple[tuple[Tensor, ...], float, float]:
    """The gradient of one micro-batch's part of the loss; its cross entropy and price, summed.

    The loss of a step of ``targets`` tokens in ``rows`` rows is the mean over tokens of the cross
    entropy plus ``price`` times the mean over rows of the price on attention.
    """
    device = model.device
    # On a CPU without matrix units bfloat16 is no faster than float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        entropy, paid = objective(model, batch.to(device), priced=price > 0)
    loss = entropy / targets + price * paid / rows
    return torch.autograd.grad(loss, tuple(model.parameters())), entropy.item(), paid.item()


def price_at(step: int, steps: int, price: float, ramp: tuple[float, float] = RAMP) -> float:
    """The factor of the price at a step: from 0 to ``price`` over ``ramp``, shares of the steps."""
    begin, end = (share * steps for share in ramp)
    return price * min(1.0, max(0.0, (step - begin) / max(1.0, end - begin)))
