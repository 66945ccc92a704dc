"""How an answer came about: from spans of the prompt through heads to the answer, edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import block_numbers, whole
from lenskit._display import Displayed
from lenskit.attention import Span
from lenskit.causal.knockout import knock_out
from lenskit.causal.patching import patch
from lenskit.causal.prompts import (
    Positions,
    Prompt,
    Read,
    answer_ids,
    position_groups,
    read_prompt,
    token_texts,
)
from lenskit.causal.runs import last_logits, padded, shifts
from lenskit.causal.sources import Mean, Source
from lenskit.models import model_fingerprint, using

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class DecisionPath(Displayed):
    """What cutting each edge from a prompt's spans to its next token does to that token.

    Effects are changes of ``measure``, in nats: negative where the token needs the edge. Cut for
    the last token alone: ``to_heads``, its attention to a span in one head; ``to_blocks``, in all
    heads of a block; ``to_last``, in all heads of the model. ``to_later``: the attention to the
    span of all tokens behind it, so that what others hand on to the last one is gone too.
    Replaced at the last token: ``from_heads``, a head's output; ``from_mlps``, an MLP's.

    ``spans``: their texts. ``blocks``: those of the axes. ``answer``: the token. ``plain``: the
    measure with nothing cut.
    """

    to_heads: Float[Tensor, "span block head"]
    to_blocks: Float[Tensor, "span block"]
    to_last: Float[Tensor, " span"]
    to_later: Float[Tensor, " span"]
    from_heads: Float[Tensor, "block head"]
    from_mlps: Float[Tensor, " block"]
    spans: tuple[str, ...]
    blocks: tuple[int, ...]
    answer: str
    plain: float
    measure: str
    model: str

    def reads(self, number: int = 10) -> dict[tuple[int, int, int], float]:
        """The strongest edges from spans to heads: effects by (span, block, head)."""
        return {
            (span, self.blocks[block], head): float(self.to_heads[span, block, head])
            for span, block, head in _strongest(self.to_heads, number)
        }

    def writes(self, heads: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """The edges from these heads, by (block, head), to the answer."""
        place = {block: row for row, block in enumerate(self.blocks)}
        return {pair: float(self.from_heads[place[pair[0]], pair[1]]) for pair in heads}

    def mlps(self, number: int = 3) -> dict[int, float]:
        """The strongest edges from MLPs to the answer, by block."""
        return {
            self.blocks[row]: float(self.from_mlps[row])
            for (row,) in _strongest(self.from_mlps, number)
        }

    def _headline(self) -> str:
        return f"DecisionPath to {self.answer!r}, {len(self.blocks)} blocks"

    def _rows(self) -> dict[str, object]:
        shown: dict[str, object] = {"measure": f"{self.measure}, {self.plain:.4g}"}
        for i, text in enumerate(self.spans[:4]):
            later, last = float(self.to_later[i]), float(self.to_last[i])
            shown[f"span {i}"] = f"{later:+.3g} ({last:+.3g} for the last token) {text!r}"
        for (span, block, head), effect in self.reads(5).items():
            after = self.writes([(block, head)])[block, head]
            shown[f"head {block}.{head}"] = (
                f"{effect:+.3g} by reading span {span}, {after:+.3g} by its output"
            )
        for block, effect in self.mlps(3).items():
            shown[f"MLP {block}"] = f"{effect:+.3g}"
        return shown

    def figure(self, *, reads: int = 10, mlps: int = 3, ax: Axes | None = None) -> Figure:
        """The strongest edges as a drawing: spans, heads by block, MLPs, the answer."""
        from lenskit.figures import path_map

        edges = self.reads(reads)
        totals = zip(self.to_later.tolist(), self.to_last.tolist(), strict=True)
        return path_map(
            edges,
            self.writes(sorted({(block, head) for _, block, head in edges})),
            self.mlps(mlps),
            spans=self.spans,
            answer=self.answer,
            blocks=self.blocks,
            label=self.measure,
            notes=[
                f"{later:+.3g} for all later tokens\n{last:+.3g} for the last"
                for later, last in totals
            ],
            title=f"{self.measure}: {self.plain:.3g}",
            ax=ax,
        )


def decision_path(
    model: TransformerBridge,
    prompt: Prompt,
    spans: Positions | Span,
    *,
    target: str | Sequence[int] | None = None,
    against: str | Sequence[int] | None = None,
    source: Source | None = None,
    blocks: Iterable[int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> DecisionPath:
    """Measure each edge from spans of a prompt through heads to the token that comes next.

    ``spans``: as in ``knock_out``, each ending before the prompt's last token. ``target``: the
    answer, of which the first token counts; by default the model's own. ``against``: another
    answer, whose first token's logit is compared with it. ``source``: what replaces the outputs of
    heads and MLPs at the last token, as in ``patch``; by default their mean over the prompt's
    tokens but the first. ``blocks``: by default all.

    Each number is one cut with everything else in place: edges do not add up, one may stand in for
    another, and what heads hand to other heads is not told apart. Costs a pass for each span, block
    and head, and for each block and head once more, all in batches.

    Raises ``ValueError`` for spans without a token behind them, and what ``knock_out`` and
    ``patch`` raise.

    >>> question = "Answer in one word. What is rain?"
    >>> span = lk.span(model, question, "rain")
    >>> path = lk.causal.decision_path(model, question, span, blocks=[0, 3])
    >>> path.to_heads.shape == (1, 2, model.cfg.n_heads)
    True
    """
    chosen = block_numbers("blocks", blocks, model.cfg.n_layers)
    whole("batch_size", batch_size, 1)
    with using(model):
        read = read_prompt(model, prompt, "prompt")
        groups = position_groups(read, spans)
        if late := [group for group in groups if max(group) == len(read) - 1]:
            raise ValueError(
                f"spans must end before the prompt's last token, at which the answer is decided; "
                f"got positions {list(late[0])} of {len(read)}"
            )
        token = _next(model, read) if target is None else answer_ids(model, read, target, "target")
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        options["target"] = list(token[:1])
        if against is not None:
            options["against"] = list(answer_ids(model, read, against, "against")[:1])
        every = [list(range(model.cfg.n_layers))]
        behind = [Span(tuple(range(max(group) + 1, len(read))), read.ids) for group in groups]

        by_block = knock_out(model, prompt, groups, blocks=list(chosen), **options)
        by_head = [
            knock_out(model, prompt, [group], heads=True, blocks=list(chosen), **options)
            for group in groups
        ]
        last = knock_out(model, prompt, groups, blocks=every, **options)
        later = [
            knock_out(model, prompt, [group], blocks=every, queries=queries, **options)
            for group, queries in zip(groups, behind, strict=True)
        ]
        options |= {"positions": [len(read) - 1], "blocks": list(chosen)}
        replaced: Source = Mean([prompt]) if source is None else source
        heads = patch(model, prompt, replaced, at="z", **options)
        mlps = patch(model, prompt, replaced, at="mlp_out", **options)
    return DecisionPath(
        torch.stack([each.effects for each in by_head]),
        by_block.effects.T.contiguous(),
        last.effects[0],
        torch.stack([each.effects[0, 0] for each in later]),
        heads.effects,
        mlps.effects[:, 0],
        by_block.names,
        chosen,
        token_texts(model, token[:1])[0],
        by_block.plain,
        _told(model, options["target"], options.get("against")),
        model_fingerprint(model),
    )


def _next(model: TransformerBridge, read: Read) -> tuple[int, ...]:
    logits = last_logits(model, padded(model, [read]), 1, shifts([read], len(read)))
    return (int(logits[0, -1].argmax()),)


def _told(model: TransformerBridge, target: Sequence[int], against: Sequence[int] | None) -> str:
    one = repr(token_texts(model, target)[0])
    if against is None:
        return f"log-probability of {one}"
    return f"logit of {one} - logit of {token_texts(model, against)[0]!r}"


def _strongest(effects: Tensor, number: int) -> list[tuple[int, ...]]:
    """Indices of the greatest effects, whatever their sign, without those that are nothing."""
    number = min(whole("number", number, 0), effects.numel())
    order = effects.abs().flatten().argsort(descending=True, stable=True)[:number]
    kept = order[effects.flatten()[order] != 0]
    axes = torch.unravel_index(kept, effects.shape)
    return list(zip(*(axis.tolist() for axis in axes), strict=True))
