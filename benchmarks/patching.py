"""What patching costs: its rows against as many plain ones, and against one forward for each site.

    python -m benchmarks.patching --shape embedded

Every block and position of one prompt is patched, in batches (``lk.causal.patch``). Beside it: the
same number of rows of the same prompt, unpatched, in the same batches; a loop with one forward pass
and one hook for each site, of which ``--share`` is run and scaled up; and the approximation by
gradients (``lk.causal.attribute``) with its agreement. "edges": the attention from the last token
to each token, cut in each block (``lk.causal.knock_out``). Cases take turns, so that a busy machine
hurts all alike.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer

from benchmarks import measure
from lenskit import causal
from lenskit.causal.prompts import Read
from lenskit.causal.runs import hook_name, last_logits, padded
from lenskit.study.clock import seconds_of


def run(
    shape: measure.ShapeOption = "embedded",
    device: measure.DeviceOption = "cpu",
    dtype: measure.DtypeOption = "float32",
    quick: measure.QuickOption = False,
    length: Annotated[int, typer.Option(help="Tokens of the prompts.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    share: Annotated[float, typer.Option(help="Of the loop over sites to run.")] = 0.25,
    repeats: Annotated[int, typer.Option(help="Medians are over so many.")] = 5,
) -> list[measure.Report]:
    """Seconds of each way, for every kind of site."""
    pair = measure.load(shape, device, dtype)
    model = pair.model
    length, repeats = (min(length, 16), min(repeats, 2)) if quick else (length, repeats)
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(10, 300, (2, length), generator=generator).tolist()
    target, sites = [20], model.cfg.n_layers * length

    report = measure.Report(
        f"Patching {sites} sites, {pair.name}, {length} tokens, {batch_size} rows a batch",
        ("site", "patched, s", "plain rows, s", "ratio", "one by one, s", "times faster"),
    )
    near = measure.Report(
        "The gradient approximation", ("site", "seconds", "spearman", "overlap of the top 10")
    )
    rows = padded(model, [Read(tuple(corrupt))]).rows([0] * sites)
    options: dict[str, Any] = {"target": target}

    @torch.no_grad()
    def plain_rows() -> None:
        for start in range(0, sites, batch_size):
            logits = last_logits(model, rows.rows(slice(start, start + batch_size)), 1, [])
            logits[:, -1].log_softmax(dim=-1)[:, target].cpu()

    @torch.no_grad()
    def one_by_one(at: str) -> None:
        values: dict[str, torch.Tensor] = {}

        def keep(value: torch.Tensor, hook: Any) -> None:
            values[hook.name] = value.clone()

        blocks = range(model.cfg.n_layers)
        last_logits(
            model,
            padded(model, [Read(tuple(clean))]),
            1,
            [(hook_name(b, at), keep) for b in blocks],
        )
        names = {block: hook_name(block, at) for block in blocks}
        alone = padded(model, [Read(tuple(corrupt))])
        for site in range(max(1, round(share * sites))):
            block, place = divmod(site * sites // max(1, round(share * sites)), length)

            def put(value: torch.Tensor, hook: Any, place: int = place) -> torch.Tensor:
                value = value.clone()
                value[:, place] = values[hook.name][:, place]
                return value

            logits = last_logits(model, alone, 1, [(names[block], put)])
            float(logits[0, -1].log_softmax(dim=-1)[target])

    for at in ("resid_post", "attn_out", "mlp_out"):
        found: dict[str, causal.Patching] = {}
        seconds: dict[str, list[float]] = {"patched": [], "plain": [], "alone": [], "fast": []}

        def patched(at: Any = at, found: dict[str, causal.Patching] = found) -> None:
            found["exact"] = causal.patch(
                model, corrupt, clean, at=at, batch_size=batch_size, **options
            )

        def attributed(at: Any = at, found: dict[str, causal.Patching] = found) -> None:
            found["fast"] = causal.attribute(model, corrupt, clean, at=at, **options)

        for turn in range(repeats + 1):
            taken = {
                "patched": seconds_of(patched, pair.device),
                "plain": seconds_of(plain_rows, pair.device),
                "fast": seconds_of(attributed, pair.device),
            }
            if turn < 2:
                taken["alone"] = seconds_of(lambda at=at: one_by_one(at), pair.device) / share
            for name, value in taken.items() if turn else ():
                seconds[name].append(value)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        # Of two runs side by side, so that other work on the machine cancels.
        pairs = zip(seconds["patched"], seconds["plain"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        report.add(
            at,
            middle["patched"],
            middle["plain"],
            ratio,
            middle["alone"],
            middle["alone"] / middle["patched"],
        )
        said = causal.agreement(found["exact"], found["fast"])
        near.add(at, middle["fast"], said.spearman, said.overlap)
    cut: dict[str, list[float]] = {"cut": [], "plain": []}
    for turn in range(repeats + 1):
        taken = {
            "cut": seconds_of(
                lambda: causal.knock_out(model, corrupt, target=target, batch_size=batch_size),
                pair.device,
            ),
            "plain": seconds_of(plain_rows, pair.device),
        }
        for name, value in taken.items() if turn else ():
            cut[name].append(value)
    ratio = statistics.median(one / other for one, other in zip(*cut.values(), strict=True))
    none = float("nan")
    report.add("edges", *(statistics.median(each) for each in cut.values()), ratio, none, none)
    return [report, near]


if __name__ == "__main__":
    measure.command(run)
