"""An independent way to steer: plain PyTorch forward hooks on Hugging Face's own model."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenskit.concepts import Concept
from lenskit.models import model_fingerprint
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
    ends=(),
) -> list[int]:
    """Greedy tokens of one prompt: no cache, no padding, the whole text anew for each token."""
    ids = list(ids)
    length = len(ids)
    for _ in range(number):
        gate = (torch.arange(len(ids)) >= start)[:, None]
        additions = {layer: gate * row for layer, row in enumerate(delta)}
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
