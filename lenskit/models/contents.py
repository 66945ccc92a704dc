"""Where the chat template writes the messages' texts, found from the template and not by search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lenskit.models.templates import Conversation


@dataclass(frozen=True)
class Located:
    """A rendered conversation, and between which characters the text of each message stands."""

    text: str
    contents: tuple[tuple[int, int], ...]


def locate(render: Callable[[Conversation], str], messages: Conversation) -> Located:
    """Render a conversation and find its messages' texts.

    The template is rendered a second time with marks in place of the texts, which cannot be
    mistaken for anything else. What stands around the marks must stand around the texts. Raises
    ``ValueError`` for a template that leaves a text out, repeats or alters it.
    """
    contents = [message["content"] for message in messages]
    marks = [f"mark{i}qzx{i}kram" for i in range(len(contents))]
    text = render(messages)
    frame = render(
        [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    )
    if wrong := [mark for mark in marks if frame.count(mark) != 1]:
        raise ValueError(
            f"the chat template writes a message {frame.count(wrong[0])} times instead of once, "
            "so the prefix cannot be located"
        )
    starts = [0] * len(contents)
    for i in sorted(range(len(contents)), key=lambda i: frame.index(marks[i])):
        starts[i] = frame.index(marks[i])
        frame = frame.replace(marks[i], contents[i])
    if frame != text:
        raise ValueError(
            "the chat template alters the text of a message, so the prefix cannot be located; "
            f"it made {text!r} of {contents!r}"
        )
    spans = zip(starts, contents, strict=True)
    return Located(text, tuple((start, start + len(content)) for start, content in spans))
