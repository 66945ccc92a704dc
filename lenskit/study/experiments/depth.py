"""What is measured of every block of a model, so that models of other depths can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.labels import GRADED, Activity, aurocs, gating_head, true_activity
from lenskit.selector import pool_heads
from lenskit.study.cells import Row
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.block_scores import agreement, held_out_correlation
from lenskit.study.experiments.cells import quietly
from lenskit.study.experiments.proxies import truths
from lenskit.study.experiments.setting import Setting

TOKEN = "selected token"
BY_BLOCK = (
    "enrichment",
    TOKEN,
    "soft label AUROC",
    "gating AUROC",
    "held-out correlation",
    "agreement of differences",
)


@dataclass(frozen=True)
class Depth:
    """Every measure of ``BY_BLOCK`` at every block, and the model's gating head.

    "enrichment": share of heads and prompts. "selected token": its place from the end, -1 the last.
    The AUROCs are of the soft label (Eq. 4) and of the head of the block whose attention to the
    prefix varies most, for «active rather than inactive» over prompts with the prefix, by the truth
    that ``activity`` says of the model's training, or else by its own answers. "held-out
    correlation" of the vector with hard labels; "agreement": mean cosine of paired differences.
    A row without a block is of the whole model: "gating head AUROC", and whether it "gates".
    """

    activity: Activity | None = None

    def __call__(self, bench: Bench, setting: Setting) -> Sequence[Row]:
        captured, tokens = bench.paired, bench.selection("attention")
        prefixed = captured.prompts.has_prefix
        rate = self._truth(bench, setting)
        clear = (rate >= GRADED[1]) | (rate <= GRADED[0])
        active = rate[clear] > 0.5
        own = tokens.take(pool_heads(captured.attention_to_prefix, "mean"))
        values = {
            "enrichment": bench.enrichment.scores,
            TOKEN: tokens.offsets.float(),
            "soft label AUROC": aurocs(own[prefixed][clear], active),
            "gating AUROC": aurocs(most_varying(captured)[prefixed][clear], active),
            "held-out correlation": quietly(held_out_correlation, bench),
            "agreement of differences": agreement(bench),
        }
        last = max(1, captured.layers - 1)
        rows: list[Row] = [
            {
                "measure": name,
                "block": block,
                "relative depth": block / last,
                "value": _known(value),
            }
            for name in BY_BLOCK
            for block, value in enumerate(values[name].tolist())
        ]
        try:
            head = gating_head(captured, seed=setting.seed)
        except ValueError:
            return rows  # no attention varies
        found = {
            "gating head AUROC": float(aurocs(head.attention[prefixed][clear], active)),
            "gates": float(head.gates),
        }
        return rows + [
            {"measure": name, "block": None, "relative depth": None, "value": _known(value)}
            for name, value in found.items()
        ]

    def _truth(self, bench: Bench, setting: Setting) -> Float[Tensor, " prompt"]:
        prompts = bench.paired.prompts
        if self.activity is not None:
            return true_activity(prompts.rows(prompts.has_prefix), self.activity)
        known = truths(bench, setting)
        return known.get("true activity", known["shown in the answer"])


def most_varying(capture: Capture) -> Float[Tensor, "prompt layer"]:
    """In each block the attention to the prefix of the head and token where it varies most.

    That is ``gating_head`` for each block alone: the largest standard deviation over the prompts
    with a prefix, no truth used.
    """
    attention = capture.attention_to_prefix.flatten(2)
    spread = attention[capture.prompts.has_prefix].std(dim=0).nan_to_num(nan=0.0)
    place = spread.argmax(dim=-1)[None, :, None].expand(len(attention), -1, 1)
    return torch.gather(attention, 2, place)[..., 0]


def _known(value: float) -> float | None:
    return value if value == value else None
