"""The context in which a model's attention is edited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lenskit.attention.edit import ActiveAttention, AttentionEdit, Queries, Schedule
from lenskit.attention.heads import Heads
from lenskit.attention.keys import ActiveKeys
from lenskit.attention.policies import Policy
from lenskit.attention.seka import KeyPolicy
from lenskit.attention.span import Span
from lenskit.models import SCORES, applied, model_report

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def attend(
    model: TransformerBridge,
    span: Span | Sequence[Span | None],
    policy: Policy | KeyPolicy,
    *,
    heads: Heads | Sequence[Heads | None] | None = None,
    queries: Queries | Sequence[Queries] = "all",
    start: int = 0,
    schedule: Schedule | None = None,
    protect_bos: bool = False,
) -> Iterator[TransformerBridge]:
    """Add a policy's bias to the attention scores, or edit keys, in every pass inside the context.

    That holds for plain forward passes (hooks on the pattern see the edited one), captures,
    ``generate`` and cached generation of Hugging Face. Contexts inside one another add up; a policy
    that reads the attention reads it under the edits outside its own.

    ``span``: the emphasised tokens, one span for all rows (which must begin with its prompt) or
    one for each row, ``None`` for a row that is left alone. ``policy``: ``Pasta``, ``LogitBias``,
    ``InstABoost``, ``Spotlight``, ``Knockout``, ``Temperature``, or a function of a ``View`` that
    returns a bias; or ``Seka`` or ``AdaSeka``, which edit the keys of the span instead, for all
    queries. ``heads``: a ``Heads``, or one for each row; by default all, except where a
    policy must have them named. ``queries``: which rows of the pattern are edited: "all", those of
    the "prompt", of "generated" tokens, or a ``Span`` (edges from its tokens). ``start``: the
    first position whose query is edited. ``schedule``: a factor of the bias as a function of the
    generated tokens so far (0 for the prompt), such as ``lambda step: 0.9 ** step``.
    ``protect_bos``: the first token, which many heads rest on, is never biased unless the span
    holds it; where keys are edited, not even then.

    Raises ``ModelCheckError`` for a model whose scores (or keys) cannot be edited, and ValueError
    for heads that the model has not, for a batch that does not begin with the span's prompt, and
    where a policy leaves a query no key.

    >>> question = "Answer in one word. What is rain?"
    >>> span = lk.span(model, question, "Answer in one word.")
    >>> with lk.attend(model, span, lk.Pasta(alpha=0.01), heads=lk.Heads({2: [0, 3]})):
    ...     answer = lk.generate(model, question, max_new_tokens=8)
    """
    spans = [span] if isinstance(span, Span) else list(span)
    several = [
        each if isinstance(each, list | tuple) else None
        for each in (None if isinstance(span, Span) else spans, heads, queries)
    ]
    counts = {len(each) for each in several if each is not None}
    if len(counts) > 1:
        raise ValueError(
            f"span, heads and queries are for different numbers of rows: {sorted(counts)}"
        )
    rows = max(counts, default=1)
    spans = spans * rows if isinstance(span, Span) else spans
    of_row: list[Any] = list(heads) if isinstance(heads, list | tuple) else [heads] * rows
    asked: list[Any] = list(queries) if isinstance(queries, list | tuple) else [queries] * rows
    edits = [
        None
        if one is None
        else AttentionEdit(one, policy, some, asking, start, schedule, protect_bos)
        for one, some, asking in zip(spans, of_row, asked, strict=True)
    ]
    with edited(model, edits, shared=not counts):
        yield model


@contextmanager
def edited(
    model: TransformerBridge, edits: Sequence[AttentionEdit | None], *, shared: bool = False
) -> Iterator[None]:
    """Apply an edit, or none, to each row of the batch; a ``shared`` one to all of them."""
    given = [edit for edit in edits if edit is not None]
    if not all(edit.of_keys for edit in given):
        model_report(model).require_edit(SCORES)
    kinds = list(dict.fromkeys(edit.kind for edit in given))
    with ExitStack() as stack:
        for kind in kinds:
            own = [edit if edit is not None and edit.kind == kind else None for edit in edits]
            first = next(edit for edit in own if edit is not None)
            active = ActiveKeys if first.of_keys else ActiveAttention
            stack.enter_context(applied(model, active(model, own, shared)))
        yield
