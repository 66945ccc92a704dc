"""The optimizers of the embedded model: Muon for the blocks' matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TOGETHER = 4

Map = Callable[[Callable[[Tensor], Tensor], Iterable[Tensor]], Iterable[Tensor]]


@torch.no_grad()
def orthogonalised(
    update: Float[Tensor, "matrix out in"], steps: int = 5, eps: float = 1e-7
) -> Float[Tensor, "matrix out in"]:
    """Each matrix with its singular values brought near 1 (Newton-Schulz, quintic)."""
    a, b, c = NEWTON_SCHULZ
    x = update.mT if update.shape[-2] > update.shape[-1] else update
    x = (x / x.flatten(1).norm(dim=1).clamp_min(eps)[:, None, None]).contiguous()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if update.shape[-2] > update.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` in float32, a few matrices of one shape at a time.

    That one works in bfloat16, which a CPU without matrix units computes some twenty times slower
    than float32; here it would take most of a step. Nesterov momentum, decoupled weight decay, and
    the rate times 0.2 sqrt(larger side), which makes an update as large as AdamW's. ``map``
    applies ``orthogonalised`` to each few: Python's own, or an executor's.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        map: Map = map,
    ) -> None:
        self.map = map
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            of_shape = defaultdict[torch.Size, list[Tensor]](list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    of_shape[matrix.shape].append(matrix)
            few = [
                matrices[i : i + TOGETHER]
                for matrices in of_shape.values()
                for i in range(0, len(matrices), TOGETHER)
            ]
            ahead = [self._ahead(matrices, group["momentum"]) for matrices in few]
            for matrices, update in zip(few, self.map(orthogonalised, ahead), strict=True):
                scale = 0.2 * max(update.shape[1:]) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, update.unbind(), alpha=-group["lr"] * scale)

    def _ahead(self, matrices: list[Tensor], momentum: float) -> Float[Tensor, "matrix out in"]:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return torch.stack(torch._foreach_lerp(grads, buffers, momentum))


def optimizers(
    model: LlamaForCausalLM, learning_rate: float, map: Map = map
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (inner if parameter.ndim == 2 and "embed" not in name else outer).append(parameter)
    return [
        Muon(inner, learning_rate, map=map),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then linear decay to a hundredth."""
    return min((step + 1) / warmup, max(0.01, (steps - step) / max(1, steps - warmup)))
