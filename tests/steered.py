"""An independent way to steer: plain PyTorch forward hooks on Hugging Face's own model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenskit.concepts import Concept
from lenskit.models import model_fingerprint
from lenskit.prompts import build_prompts
from lenskit.vectors import ConceptVectors


def random_vectors(model, seed=0) -> ConceptVectors:
    """Unit vectors of no meaning, with norms that differ between blocks."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=generator)
    return ConceptVectors(
        directions=drawn / drawn.norm(dim=1, keepdim=True),
        validation=torch.zeros(model.cfg.n_layers),
        resid_norm=1 + 4 * torch.rand(model.cfg.n_layers, generator=generator),
        model=model_fingerprint(model),
        concept=Concept("Take on a cheerful mood."),
        learner="random",
        selection="none",
        labels="none",
        data_hash="",
        version="",
    )


@cache
def _closing(model) -> tuple[tuple[str, ...], tuple[int, ...]]:
    made = build_prompts(model, "Take on a cheerful mood.", number=4)
    ids = made.tokens.input_ids[0, -len(made.candidates) :]
    return made.candidates, tuple(ids.tolist())


def own_vectors(model, seed=0) -> ConceptVectors:
    """Unit vectors of no meaning for each closing token of the model's template."""
    candidates, closing = _closing(model)
    generator = torch.Generator().manual_seed(100 + seed)
    shape = model.cfg.n_layers, len(closing), model.cfg.d_model
    drawn = torch.randn(*shape, generator=generator)
    return replace(
        random_vectors(model, seed),
        directions=drawn / drawn.norm(dim=-1, keepdim=True),
        validation=torch.zeros(shape[:2]),
        candidates=candidates,
        closing=closing,
    )


def at_the_end(length: int, own: Float[Tensor, "layer candidate d_model"], end: int | None = None):
    """What ``plain_hooks`` adds to a text of this length whose prompt ends before ``end``."""
    end = length if end is None else end
    rows = torch.zeros(len(own), length, own.shape[-1])
    rows[:, end - own.shape[1] : end] = own
    return dict(enumerate(rows))


def decoder_layers(hf_model) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face model."""
    lists = [module for module in hf_model.modules() if isinstance(module, nn.ModuleList)]
    return next(each for each in lists if len(each) == hf_model.config.num_hidden_layers)


@contextmanager
def plain_hooks(hf_model, additions: dict[int, Tensor]):
    """Add ``additions[layer]`` (whatever broadcasts) to the output of decoder layers."""

    def adder(addition):
        def add(module, inputs, output):
            if isinstance(output, tuple):
                return (output[0] + addition.to(output[0]), *output[1:])
            return output + addition.to(output)

        return add

    layers = decoder_layers(hf_model)
    handles = [layers[i].register_forward_hook(adder(value)) for i, value in additions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference_tokens(
    hf_model,
    ids: list[int],
    delta: Float[Tensor, "layer d_model"],
    number: int,
    *,
    start=0,
    stop=None,
    ends=(),
    own: Float[Tensor, "layer candidate d_model"] | None = None,
) -> list[int]:
    """Greedy tokens of one prompt: no cache, no padding, the whole text anew for each token.

    ``delta`` is added at every token, ``own`` at the closing tokens of the prompt.
    """
    ids = list(ids)
    length = len(ids)
    for _ in range(number):
        places = torch.arange(len(ids))
        gate = ((places >= start) & (places < (len(ids) if stop is None else stop)))[:, None]
        additions = {layer: gate * row for layer, row in enumerate(delta)}
        for layer, row in at_the_end(len(ids), own, length).items() if own is not None else ():
            additions[layer] = additions[layer] + gate * row
        with plain_hooks(hf_model, additions):
            logits = hf_model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[length:]


def hook_count(model) -> int:
    """How many PyTorch hooks the whole model holds, of any kind."""
    modules = [*model.modules(), *model.original_model.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in set(modules))
