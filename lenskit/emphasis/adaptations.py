"""Other ways to teach a model the same prompts: weights, a soft prompt, vectors, all by Adam.

Each is a function of a model, tasks and a seed that leaves the model as it was and returns an
``Adaptation``. The data are the targets of the tasks' prompts, as ``learn_head_bias`` sees them,
and every step draws as many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenskit._arguments import block_numbers, whole
from lenskit._display import Displayed
from lenskit.emphasis.soft import SoftPrompt, inserted
from lenskit.emphasis.targets import drawn, target_losses, with_targets
from lenskit.models import (
    RESID,
    ModelCheckError,
    chat_ids,
    decoder_layers,
    hooked,
    run_plain,
    using,
)
from lenskit.steering import steer
from lenskit.tasks import Task, TaskPrompt, emphasised_span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Deltas = Mapping[str, Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class Adaptation(Displayed):
    """What was learnt: changes of weights, a soft prompt, or vectors that are added.

    ``deltas``: by the name of a parameter of ``model.original_model``, what is added to it.
    ``vectors``: for some blocks. ``parameters``: how many numbers were learnt. ``losses``: of every
    step, nats a token of the targets.
    """

    parameters: int
    losses: tuple[float, ...]
    deltas: Deltas | None = None
    soft: SoftPrompt | None = None
    vectors: Mapping[int, Float[Tensor, " d_model"]] | None = None

    def _rows(self) -> dict[str, object]:
        return {"parameters": f"{self.parameters:,}", "loss": f"{self.losses[-1]:.3g} at the end"}

    def inside(self, model: TransformerBridge) -> AbstractContextManager[Any]:
        """The context in which its weights or its soft prompt are at work on a model."""
        if self.deltas is not None:
            return changed_weights(model, self.deltas)
        return nullcontext() if self.soft is None else self.soft.inside(model)


@contextmanager
def changed_weights(model: TransformerBridge, deltas: Deltas) -> Iterator[None]:
    """Add to weights by their names; afterwards they are bit for bit what they were.

    Raises ValueError for a name or a shape that the model has not.
    """
    known = dict(model.original_model.named_parameters())
    for name, delta in deltas.items():
        if name not in known or known[name].shape != delta.shape:
            raise ValueError(f"the model has no weight {name!r} of shape {list(delta.shape)}")
    with using(model) as note:
        for name, delta in deltas.items():
            _noted(note, known[name])
            with torch.no_grad():
                known[name].add_(delta.to(known[name]))
        yield


def fine_tune(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    steps: int = 40,
    number: int = 8,
    rate: float = 3e-4,
    seed: int = 0,
) -> Adaptation:
    """Every weight moves, by Adam at ``rate``."""
    weights = dict(model.original_model.named_parameters())
    start = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in weights.items()}
    return _descend(model, tasks, start, lambda own: own, steps, number, rate, seed)


def low_rank(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    rank: int = 4,
    steps: int = 40,
    number: int = 8,
    rate: float = 5e-3,
    seed: int = 0,
) -> Adaptation:
    """LoRA (arXiv 2106.09685): every matrix of the blocks gains ``B A`` of a low rank."""
    rank = whole("rank", rank, 1)
    blocks = {id(each) for each in decoder_layers(model.original_model).parameters()}
    random = torch.Generator().manual_seed(seed)
    start: dict[str, Tensor] = {}
    for name, weight in model.original_model.named_parameters():
        if id(weight) in blocks and weight.ndim == 2:
            rows, columns = weight.shape
            drawn_a = torch.randn(rank, columns, generator=random) / columns**0.5
            start[f"{name}:A"] = drawn_a.to(weight.device)
            start[f"{name}:B"] = torch.zeros(rows, rank, device=weight.device)

    def deltas(own: Deltas) -> dict[str, Tensor]:
        names = [name[:-2] for name in own if name.endswith(":A")]
        return {name: own[f"{name}:B"] @ own[f"{name}:A"] for name in names}

    return _descend(model, tasks, start, deltas, steps, number, rate, seed)


def rank_one(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    block: int | None = None,
    steps: int = 40,
    number: int = 8,
    rate: float = 0.1,
    seed: int = 0,
) -> Adaptation:
    """A rank-one edit of one MLP's output weights, in the form of ROME (arXiv 2202.05262).

    ``ΔW = v (C⁻¹k)ᵀ / (kᵀC⁻¹k)``: ``k`` is the mean input of these weights at the last token of
    the spans, ``C`` their second moment over all tokens of the prompts, and ``v``, what is written
    there in addition, is learnt. ``block``: by default the middle one. Raises ModelCheckError for a
    model without such weights.
    """
    middle = model.cfg.n_layers // 2
    (block,) = block_numbers("block", [middle if block is None else block], model.cfg.n_layers)
    module = getattr(getattr(model.blocks[block].mlp, "out", None), "original_component", None)
    if not isinstance(module, nn.Linear):
        raise ModelCheckError(f"block {block} has no linear output of an MLP, which is edited")
    name = next(
        name for name, each in model.original_model.named_parameters() if each is module.weight
    )
    key = _key(model, module, tasks)

    def deltas(own: Deltas) -> dict[str, Tensor]:
        return {name: own["v"][:, None] * key}

    start = {"v": torch.zeros(module.out_features, device=module.weight.device)}
    found = _descend(model, tasks, start, deltas, steps, number, rate, seed)
    both = module.out_features + module.in_features
    return Adaptation(both, found.losses, found.deltas)


def soft_prompt(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    length: int = 8,
    steps: int = 40,
    number: int = 8,
    rate: float = 0.02,
    seed: int = 0,
) -> Adaptation:
    """Embeddings of ``length`` tokens before the question (arXiv 2104.08691), from drawn ones."""
    length = whole("length", length, 1)
    weight = model.original_model.get_input_embeddings().weight.detach()
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(weight), (length,), generator=random).to(weight.device)
    learnt = weight[rows].clone().float().requires_grad_(True)
    soft = SoftPrompt.of(model, learnt)
    optimiser, losses = torch.optim.Adam([learnt], lr=rate), []
    with using(model), torch.enable_grad():
        for prompts in drawn(tasks, steps, number, seed):
            with soft.inside(model):
                loss = target_losses(model, [inserted(prompt, soft.text) for prompt in prompts])
            (learnt.grad,) = torch.autograd.grad(loss.mean(), [learnt])
            optimiser.step()
            losses.append(float(loss.detach().mean()))
    kept = SoftPrompt(learnt.detach().cpu(), soft.token, soft.text)
    return Adaptation(learnt.numel(), tuple(losses), soft=kept)


def steering_vectors(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    *,
    blocks: Sequence[int] | None = None,
    positions: Literal["all", "answer"] = "all",
    steps: int = 40,
    number: int = 8,
    rate: float = 0.02,
    seed: int = 0,
) -> Adaptation:
    """One vector for each of ``blocks``, learnt together from zero.

    They are added at every token, or at those that the "answer" is written from.
    """
    chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
    learnt = torch.zeros(len(chosen), model.cfg.d_model, device=model.cfg.device)
    learnt.requires_grad_(True)

    def adder(place: int, value: Tensor, hook: Any) -> Tensor:
        return value + at.to(value) * learnt[place].to(value)

    hooks = [(f"blocks.{block}.{RESID}", partial(adder, i)) for i, block in enumerate(chosen)]
    optimiser, losses = torch.optim.Adam([learnt], lr=rate), []
    with using(model), torch.enable_grad():
        for prompts in drawn(tasks, steps, number, seed):
            tokens, wanted = with_targets(model, prompts)
            writing = tokens.attention_mask if positions == "all" else wanted.roll(-1, dims=1)
            at = writing[..., None]
            with hooked(model, hooks):
                loss = target_losses(model, prompts)
            (learnt.grad,) = torch.autograd.grad(loss.mean(), [learnt])
            optimiser.step()
            losses.append(float(loss.detach().mean()))
    vectors = dict(zip(chosen, learnt.detach().cpu(), strict=True))
    return Adaptation(learnt.numel(), tuple(losses), vectors=vectors)


def _descend(
    model: TransformerBridge,
    tasks: Task | Sequence[Task],
    start: Mapping[str, Tensor],
    deltas: Callable[[Deltas], Mapping[str, Tensor]],
    steps: int,
    number: int,
    rate: float,
    seed: int,
) -> Adaptation:
    """Adam on what the weights' changes are made of, by the chain rule."""
    own = {name: each.clone().requires_grad_(True) for name, each in start.items()}
    known = dict(model.original_model.named_parameters())
    weights = {name: known[name] for name in deltas(own)}
    optimiser, losses = torch.optim.Adam(own.values(), lr=rate), []
    with using(model) as note, torch.enable_grad():
        for weight in weights.values():
            _noted(note, weight)
            weight.requires_grad_(True)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for prompts in drawn(tasks, steps, number, seed):
            added = deltas(own)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name] + added[name])
            loss = target_losses(model, prompts).mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            pairs = zip(added.values(), gradients, strict=True)
            # Its gradient is that of the loss, as a function of what the changes are made of.
            same = torch.stack([(each * g).sum() for each, g in pairs if g is not None]).sum()
            found = torch.autograd.grad(same, list(own.values()), allow_unused=True)
            for each, gradient in zip(own.values(), found, strict=True):
                each.grad = gradient
            optimiser.step()
            losses.append(float(loss.detach()))
        made = {name: each.detach().cpu() for name, each in deltas(own).items()}
    parameters = sum(each.numel() for each in own.values())
    return Adaptation(parameters, tuple(losses), made)


def _noted(note: Callable[[Callable[[], object]], None], weight: Tensor) -> None:
    kept, learns = weight.detach().clone(), weight.requires_grad

    def restore() -> None:
        with torch.no_grad():
            weight.copy_(kept)
        weight.requires_grad_(learns)

    note(restore)


def _key(
    model: TransformerBridge, module: nn.Module, tasks: Task | Sequence[Task]
) -> Float[Tensor, " d_mlp"]:
    """``C⁻¹k / (kᵀC⁻¹k)`` of the inputs of a module."""
    prompts = [p for task in ([tasks] if isinstance(tasks, Task) else tasks) for p in task.prompts]
    spans = [emphasised_span(model, prompt) for prompt in prompts]
    tokens = chat_ids(model, [prompt.messages for prompt in prompts])
    keys: list[Tensor] = []
    moment: Any = 0.0
    seen: list[Tensor] = []
    with using(model) as note:
        handle = module.register_forward_hook(lambda own, args, out: seen.append(args[0].detach()))
        note(handle.remove)
        for rows in torch.arange(len(prompts)).split(32):
            seen.clear()
            batch = tokens.rows(rows).trimmed()
            run_plain(model.original_model, batch, use_cache=False)
            values = seen[-1].double()
            real = batch.attention_mask.bool().to(values.device)
            moment = moment + values[real].T @ values[real] / int(tokens.attention_mask.sum())
            width = values.shape[1]
            for row, own in zip(rows.tolist(), values, strict=True):
                span = spans[row]
                keys.append(own[width - span.length + span.positions[-1]])
    key = torch.stack(keys).mean(dim=0)
    ridge = 1e-3 * moment.diagonal().mean() * torch.eye(len(key), device=key.device).double()
    solved = torch.linalg.solve(moment + ridge, key)
    return (solved / (key @ solved)).float()


@torch.no_grad()
def adapted_loss(
    model: TransformerBridge, found: Adaptation | None, prompts: Sequence[TaskPrompt]
) -> float:
    """Mean loss of the prompts' targets, nats a token, with an adaptation at work."""
    if found is None:
        return float(target_losses(model, prompts).mean())
    if found.vectors is not None:
        with steer(model, found.vectors, coefficient=1.0, start=0):
            return float(target_losses(model, prompts).mean())
    asked = prompts if found.soft is None else [inserted(p, found.soft.text) for p in prompts]
    with found.inside(model):
        return float(target_losses(model, asked).mean())
