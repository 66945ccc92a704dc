"""Attention knock-out: which edges from the answer to a span carry it (arXiv 2304.14767)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lenskit._arguments import whole
from lenskit.attention import AttentionEdit, Heads, Knockout, Span, edited
from lenskit.causal.measures import Target, measure_of
from lenskit.causal.prompts import (
    Groups,
    Positions,
    Prompt,
    Read,
    block_groups,
    position_groups,
    read_prompt,
    require_span,
    token_texts,
)
from lenskit.causal.results import Patching
from lenskit.causal.runs import last_logits, padded, shifts
from lenskit.models import in_batches, model_fingerprint, using

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def knock_out(
    model: TransformerBridge,
    prompt: Prompt,
    spans: Positions | Span | None = None,
    *,
    target: Target,
    against: str | Sequence[int] | None = None,
    heads: bool = False,
    blocks: Groups | None = None,
    queries: Literal["last", "all"] | Span = "last",
    batch_size: int = 64,
    progress: bool = False,
) -> Patching:
    """Cut the attention to one span after the other, in one block after the other, all in batches.

    ``spans``: ``lk.span`` of this prompt, positions, or lists of positions; by default each token
    alone. All heads of a block are cut together, which gives [block, span]; with ``heads`` and one
    span each head alone: [block, head]. ``blocks``: by default each alone; a list of blocks is a
    window that is cut as one, since a single block often has others to stand in for it.
    ``queries``: whose attention is cut: that of the "last" token of the prompt (and of the target's
    tokens behind it), of "all" tokens, or of those of a span. ``target`` and ``against`` as in
    ``patch``. The attention that is left is normalised as ever.

    A negative effect says that the answer needs the edge. Costs a forward pass for each row.

    Raises ``ValueError`` where a query would have no key left (the first token is all that early
    queries have), and ``ModelCheckError`` for models whose attention scores cannot be edited.

    >>> question = "Answer in one word. What is rain?"
    >>> span = lk.span(model, question, "rain")
    >>> found = lk.causal.knock_out(model, question, span, target="I", heads=True)
    >>> found.axes, found.values.shape == (model.cfg.n_layers, model.cfg.n_heads)
    (('block', 'head'), True)
    """
    read = read_prompt(model, prompt, "prompt")
    batch_size = whole("batch_size", batch_size, 1)
    windows = block_groups(blocks, model.cfg.n_layers)
    places = position_groups(read, spans)
    if heads and len(places) != 1:
        raise ValueError(f"heads=True is for one span, got {len(places)}")
    start, asking = _asking(read, queries)
    measure = measure_of(model, read, target, against)
    row = read.then(measure.more)

    number = model.cfg.n_heads
    columns: list[tuple[tuple[int, ...], range]]
    if heads:
        columns = [(places[0], range(head, head + 1)) for head in range(number)]
        names = [f"head {head}" for head in range(number)]
    else:
        columns = [(place, range(number)) for place in places]
        texts = token_texts(model, read.ids)
        names = ["".join(texts[each] for each in place) for place in places]
    policy = Knockout()
    edits = [
        AttentionEdit(
            Span(place, read.ids), policy, Heads(product(window, own)), asking, start=start
        )
        for window in windows
        for place, own in columns
    ]
    tokens = padded(model, [row]).rows([0] * len(edits))
    width = tokens.input_ids.shape[1]
    measured = torch.zeros(len(edits))

    def run(rows: Tensor) -> None:
        some = tokens.rows(rows)
        with edited(model, [edits[each] for each in rows.tolist()]):
            logits = last_logits(model, some, measure.kept, shifts([row] * len(rows), width))
        measured[rows] = measure.read(logits).float().cpu()

    with using(model):
        alone = last_logits(model, padded(model, [row]), measure.kept, shifts([row], width))
        in_batches(tokens, batch_size, run, progress=progress, description="Knocking out")
    return Patching(
        measured.view(len(windows), len(columns)),
        float(measure.read(alone)),
        float("nan"),
        tuple(windows),
        tuple((head,) for head in range(number)) if heads else tuple(places),
        tuple(names),
        ("block", "head" if heads else "pos"),
        "attention",
        measure.name,
        "knock-out",
        model_fingerprint(model),
    )


def _asking(prompt: Read, queries: Any) -> tuple[int, Any]:
    """From which position on queries are cut, and which of them."""
    if isinstance(queries, Span):
        require_span(prompt, queries)
        return 0, queries
    if queries not in ("last", "all"):
        raise ValueError(f"queries must be 'last', 'all' or a Span, got {queries!r}")
    return (len(prompt) - 1 if queries == "last" else 0), "all"
