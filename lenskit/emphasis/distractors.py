"""What stands between an instruction and its question: the text that knock-out takes away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lenskit.attention import Span
from lenskit.tasks import TaskPrompt, emphasised_span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def distractor_span(model: TransformerBridge, prompt: TaskPrompt) -> Span | None:
    """The tokens of a prompt of the embedded corpus that lead away from its span; None for none.

    The filler of format and pronouns; all of the biography behind its first sentence; the other
    sentences of a passage; the other one of two requested formats; the user's plea under a rule.
    Prompts of other tasks have none.
    """
    found: Span | None = None
    for message, start, end in _places(prompt):
        text = prompt.messages[message]["content"]
        part = text[start:end].strip()
        if not part:
            continue
        start += text[start:end].index(part)
        several = text.count(part) > 1
        nth = text[:start].count(part) if several else None
        own = emphasised_span(
            model, replace(prompt, emphasised=part, emphasised_in=message, nth=nth)
        )
        found = own if found is None else found | own
    return found


def _places(prompt: TaskPrompt) -> Iterator[tuple[int, int, int]]:
    """Message, and from which to which of its characters."""
    at, known = prompt.emphasised_in % len(prompt.messages), prompt.metadata
    text = prompt.messages[at]["content"]
    start, end = prompt.characters
    line = text.find("\n", end)
    line = len(text) if line < 0 else line
    if known.get("family") in ("format", "pronouns"):
        if known["length"]:
            after = text.find("\n", line + 1)
            yield at, line, len(text) if after < 0 else after
    elif known.get("family") == "occupation":
        yield at, end, line
    elif "distractors" in known:
        opening = text.find(":") + 1
        yield at, opening, start
        yield at, end, line
    elif "earlier" in known:
        yield at, 0, start
        yield at, end, line
    elif "plea" in known and at != len(prompt.messages) - 1:
        last = prompt.messages[-1]["content"]
        if asked := re.search(r"\?[^?]*$", last):
            yield len(prompt.messages) - 1, asked.start() + 1, len(last)
