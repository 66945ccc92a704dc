"""How long a Recursive Feature Machine takes on d x d matrices and in the span of its rows.

    python -m benchmarks.rfm --dim 256 --dim 1024 --blocks 2

Both fit the whole grid on the same made activations (unit rows, four fifths train), and should
choose the same setting: the cosine is that of their vectors. The dense procedure is the textbook
one in float64 with a Lanczos eigensolver; it takes tens of seconds for a block of dimension 4096,
so it is timed on one block, and ``--no-dense`` leaves it out. Seconds are medians over repeats.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import eigsh
from torch import Tensor

from benchmarks import measure
from lenskit.study.clock import seconds_of
from lenskit.vectors import fit_blocks
from lenskit.vectors.rfm.recursion import Setting

BANDWIDTHS = (1.0, 10.0, 100.0)
ITERATIONS = 10
REGULARIZATION = 1e-3


def main(
    dim: Annotated[list[int] | None, typer.Option(help="Width of the model; repeatable.")] = None,
    n: Annotated[int, typer.Option(help="Prompts, of which a fifth validate.")] = 400,
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 1,
    device: Annotated[str, typer.Option(help="Where to fit.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="Of the span; repeatable.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks fitted together.")] = None,
    hard: Annotated[bool, typer.Option(help="Labels 0 and 1, not soft ones.")] = False,
    dense: Annotated[bool, typer.Option(help="Time the dense procedure, too.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Medians are over so many (dense: one).")] = 3,
) -> None:
    """Print the seconds of a block for both procedures, their ratio, and their vectors' cosine."""
    if threads is not None:
        torch.set_num_threads(threads)
    table = Table(
        title=f"{n} prompts, {blocks} blocks, {device}, {torch.get_num_threads()} threads"
    )
    for name in ("dim", "dtype", "dense, s/block", "span, s/block", "all, s", "ratio", "cosine"):
        table.add_column(name, justify="right")
    for width in dim or (256, 1024):
        X, y = made_activations(blocks, n, width, hard=hard)
        X, y = X.to(device), y.to(device)
        expected: list[tuple[Tensor, Setting]] = []
        dense_seconds = float("nan")
        if dense:

            def fit_dense(X=X, y=y, expected=expected):
                expected.append(dense_fit(X[0].double(), y[0].double()))

            dense_seconds = seconds_of(fit_dense, X.device)
        for precision in dtype or ("float64", "float32"):

            def fit(X=X, y=y, precision=precision):
                return fit_blocks(X, y, dtype=precision, batch_size=batch_size)

            span_seconds = measure.medians({"": fit}, X.device, repeats)[""]
            cosine, note = "", ""
            if expected:
                vector, setting = expected[0]
                found = fit_blocks(X[:1], y[:1], dtype=precision)
                cosine = f"{abs(float(found.directions[0] @ vector)):.9f}"
                note = "" if found.settings[0] == setting else " (another setting)"
            table.add_row(
                str(width),
                precision,
                f"{dense_seconds:.2f}" if dense else "",
                f"{span_seconds / blocks:.3f}",
                f"{span_seconds:.2f}",
                f"{dense_seconds * blocks / span_seconds:.1f}" if dense else "",
                cosine + note,
            )
    Console().print(table)


def made_activations(blocks: int, n: int, d: int, *, hard: bool, seed: int = 0) -> tuple:
    """Unit rows with uneven spread, a few outlying dimensions, and one direction of a concept."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.arange(1, d + 1) ** -0.5
    mixing = torch.linalg.qr(normal(d, min(d, 512))).Q
    active = torch.rand(blocks, n, generator=generator) * (torch.arange(n) % 2)
    rows = []
    for block in range(blocks):
        noise = normal(n, mixing.shape[1]) * spread[: mixing.shape[1]] @ mixing.T
        noise = noise + 0.3 * normal(n, d) / d**0.5
        direction = normal(d) / d**0.5
        X = (
            noise / noise.norm(dim=1).mean()
            + active[block, :, None] * direction
            + normal(d) / d**0.5
        )
        X[:, :3] += torch.tensor([8.0, -4.0, 3.0]) + 0.3 * normal(n, 3)
        rows.append(X / X.norm(dim=1, keepdim=True))
    y = (active > 0).float() if hard else active / active.amax(1, keepdim=True)
    return torch.stack(rows), y


def dense_fit(X: Tensor, y: Tensor) -> tuple[Tensor, Setting]:
    """The best top eigenvector over grid and iterations, with M as a d x d matrix."""
    train = len(X) - min(256, len(X) // 5)
    centred = X[:train] - X[:train].mean(0)
    best, chosen = -1.0, None
    for scaled in (False, True):
        rows = torch.nn.functional.normalize(centred, dim=1) if scaled else centred
        for bandwidth in BANDWIDTHS:
            M = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
            for iteration in range(1, ITERATIONS + 1):
                M = dense_update(rows, y[:train], M, bandwidth)
                vector = top_eigenvector(M)
                pair = torch.stack([X[train:] @ vector, y[train:]])
                score = float(torch.corrcoef(pair)[0, 1].abs())
                if score > best:
                    best, chosen = score, (vector, Setting(scaled, bandwidth, iteration))
    return chosen


def dense_update(X: Tensor, y: Tensor, M: Tensor, bandwidth: float) -> Tensor:
    """One average gradient outer product."""
    image = X @ M
    inner = image @ X.T
    diagonal = inner.diagonal()
    distance = (diagonal[:, None] + diagonal - 2 * inner).clamp_min(0).fill_diagonal_(0).sqrt()
    kernel = torch.exp(-distance / bandwidth)
    ridge = REGULARIZATION * torch.eye(len(X), dtype=X.dtype, device=X.device)
    alpha = torch.linalg.solve(kernel + ridge, y)
    weights = torch.where(distance > 0, kernel / distance, 0) * alpha
    gradients = weights @ image - weights.sum(1, keepdim=True) * image
    gradients = gradients - gradients.mean(0)
    M = gradients.T @ gradients
    return M / M.max()


def top_eigenvector(M: Tensor) -> Tensor:
    """By Lanczos on a CPU, all eigenvectors on a GPU."""
    if M.is_cuda:
        return torch.linalg.eigh(M).eigenvectors[:, -1]
    return torch.from_numpy(eigsh(M.numpy(), k=1, tol=1e-12)[1][:, 0])


if __name__ == "__main__":
    typer.run(main)
