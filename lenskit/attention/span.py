"""Spans: which tokens of a prompt hold a text, for every tokenizer and chat template.

Text is found in the messages themselves, never in what the template writes around them, and a
token belongs to a span if it holds a character of it that is no blank (``lenskit.models.spans``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenskit._arguments import whole
from lenskit._display import Displayed, count, quoted
from lenskit.models import (
    Conversation,
    encode_with_offsets,
    locate,
    refuse_special,
    render,
    tokens_of,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_AROUND = 30


@dataclass(frozen=True, repr=False)
class Span(Displayed):
    """Tokens of one prompt: their ``positions``, and the ``ids`` of the whole prompt.

    Positions count the prompt's own tokens, padding left out. ``text`` is what was looked for.
    ``a | b`` is the union of two spans of one prompt; ``a & b`` and ``a - b`` as for sets.
    """

    positions: tuple[int, ...]
    ids: tuple[int, ...]
    text: str = ""

    def __post_init__(self) -> None:
        own = tuple(sorted({whole("a position", each, 0) for each in self.positions}))
        if not own or own[-1] >= len(self.ids):
            raise ValueError(
                f"a span needs positions from 0 to {len(self.ids) - 1}, those of its prompt; "
                f"got {list(self.positions)}"
            )
        object.__setattr__(self, "positions", own)
        object.__setattr__(self, "ids", tuple(int(each) for each in self.ids))

    @property
    def length(self) -> int:
        """The number of tokens of the whole prompt; what comes behind is generated."""
        return len(self.ids)

    def __len__(self) -> int:
        return len(self.positions)

    def __or__(self, other: Span) -> Span:
        return self._joined(other, {*self.positions, *other.positions}, "|")

    def __and__(self, other: Span) -> Span:
        return self._joined(other, {*self.positions} & {*other.positions}, "&")

    def __sub__(self, other: Span) -> Span:
        return self._joined(other, {*self.positions} - {*other.positions}, "-")

    def _joined(self, other: Span, positions: set[int], sign: str) -> Span:
        if not isinstance(other, Span):
            return NotImplemented
        if self.ids != other.ids:
            raise ValueError(
                f"the spans {self.text!r} and {other.text!r} are of different prompts, of "
                f"{self.length} and {other.length} tokens; join only spans of one prompt"
            )
        if not positions:
            raise ValueError(f"{self.text!r} {sign} {other.text!r} holds no token")
        return Span(tuple(positions), self.ids, f"{self.text} {sign} {other.text}")

    def _headline(self) -> str:
        return f"Span of {count(len(self), 'token')} in a prompt of {self.length}"

    def _rows(self) -> dict[str, object]:
        return {"text": quoted([self.text]), "positions": _runs(self.positions)}


def span(
    model: TransformerBridge,
    messages: str | Conversation,
    text: str | Sequence[str] | None = None,
    *,
    nth: int | None = None,
    regex: str | None = None,
    characters: tuple[int, int] | None = None,
    tokens: tuple[int, int] | None = None,
    passage: str | None = None,
    role: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Span:
    """The tokens that hold a part of a prompt, for ``attend``.

    ``messages``: a question, or a conversation as ``generate`` takes it. The part is one of:
    ``text`` (several texts: their union); ``regex``, a pattern (its first group where it has
    one); ``passage``, the paragraph that begins with ``passage`` and a colon, without both;
    ``characters``, from which to which character of the message; ``tokens``, from which to which
    token of the whole prompt, negative ones from its end; or ``role`` alone, that role's whole
    messages. Beside the others ``role`` says whose messages are searched ("user", "system",
    "assistant"; by default all, and for ``characters`` the last message). ``nth`` says which
    occurrence is meant (0 the first, -1 the last) where there are several.

    Raises ValueError for a part that is missing, empty, holds no token, or occurs several times
    while ``nth`` is not given, and shows the text around it.

    >>> lk.span(model, "Answer in one word. What is rain?", "Answer in one word.").text
    'Answer in one word.'
    """
    conversation: Conversation = (
        [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    )
    given = {"text": text, "regex": regex, "characters": characters, "tokens": tokens}
    given |= {"passage": passage}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1 or (not named and role is None):
        raise ValueError(
            f"give one of {', '.join(given)}, or role alone, to say which part is meant; got "
            f"{' and '.join(named) or 'none'}"
        )
    tokenizer = model.tokenizer
    refuse_special(tokenizer, [message["content"] for message in conversation], "a message")
    whole_text, contents = _located(model, conversation, template_arguments)
    (ids,), (offsets,) = encode_with_offsets(tokenizer, [whole_text])
    if tokens is not None:
        return _of_tokens(tokenizer, ids, tokens)
    searched = [
        place
        for place, message in zip(contents, conversation, strict=True)
        if role is None or message["role"] == role
    ]
    if not searched:
        roles = sorted({message["role"] for message in conversation})
        raise ValueError(f"role={role!r} has no message here; there are {', '.join(roles)}")
    if not named:
        places = searched
    elif characters is not None:
        places = [_characters(whole_text, searched[-1], characters)]
    else:
        patterns = (
            [regex]
            if regex is not None
            else [rf"(?m)^[ \t]*{re.escape(passage)}:[ \t]*(.+?)[ \t]*$"]
            if passage is not None
            else [re.escape(each) for each in _texts(text)]
        )
        what = [f"{named[0]}={each!r}" for each in (_texts(text) if text else [regex or passage])]
        places = [
            _chosen(whole_text, searched, pattern, name, nth)
            for pattern, name in zip(patterns, what, strict=True)
        ]
    held = [tokens_of(whole_text, offsets, *place) for place in places]
    for place, found in zip(places, held, strict=True):
        if not found:
            raise ValueError(
                f"{whole_text[slice(*place)]!r} holds no token of this prompt; "
                f"around it stands {_around(whole_text, place)}"
            )
    return Span(
        tuple(position for found in held for position in found),
        tuple(ids),
        " | ".join(whole_text[slice(*place)] for place in places),
    )


def _located(
    model: TransformerBridge,
    conversation: Conversation,
    template_arguments: Mapping[str, Any] | None,
) -> tuple[str, Sequence[tuple[int, int]]]:
    """The prompt's text and where the messages stand in it, whether or not blanks are trimmed."""

    def written(messages: Conversation) -> str:
        return render(model.tokenizer, messages, template_arguments)

    text = written(conversation)
    stripped = [{**message, "content": message["content"].strip()} for message in conversation]
    found = locate(written, stripped if written(stripped) == text else conversation)
    return found.text, found.contents


def _texts(text: Any) -> list[str]:
    given = [text] if isinstance(text, str) else list(text)
    if not given or any(not isinstance(each, str) or not each.strip() for each in given):
        raise ValueError(f"text must be a text that is not empty, or several; got {text!r}")
    return given


def _chosen(
    text: str, searched: Sequence[tuple[int, int]], pattern: str, what: str, nth: int | None
) -> tuple[int, int]:
    """Where the pattern matches in the messages, the only place or the one that is meant."""
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is no regular expression: {error}") from None
    found = [
        (start + match.start(group), start + match.end(group))
        for start, end in searched
        for match in matcher.finditer(text[start:end])
        for group in [1 if matcher.groups else 0]
        if match.end(group) > match.start(group) >= 0
    ]
    if not found:
        shown = " … ".join(repr(text[start:end][: 6 * _AROUND]) for start, end in searched)
        raise ValueError(f"{what} is not in the prompt; its messages are {shown}")
    if nth is None and len(found) > 1:
        listed = "; ".join(f"nth={i}: {_around(text, place)}" for i, place in enumerate(found[:5]))
        raise ValueError(f"{what} occurs {len(found)} times; say which with nth: {listed}")
    place = 0 if nth is None else nth
    if not -len(found) <= place < len(found):
        raise ValueError(f"nth={nth}, but {what} occurs {len(found)} times (from 0)")
    return found[place]


def _characters(
    text: str, message: tuple[int, int], characters: tuple[int, int]
) -> tuple[int, int]:
    start, end = characters
    length = message[1] - message[0]
    if not 0 <= start < end <= length:
        raise ValueError(
            f"characters={tuple(characters)} must be from 0 to {length} and in order, those of "
            f"{text[slice(*message)]!r}"
        )
    return message[0] + start, message[0] + end


def _of_tokens(tokenizer: Any, ids: Sequence[int], tokens: tuple[int, int]) -> Span:
    start, end = (each + len(ids) if each < 0 else each for each in tokens)
    if not 0 <= start < end <= len(ids):
        raise ValueError(
            f"tokens={tuple(tokens)} must be in order and within the prompt, which has {len(ids)}"
        )
    return Span(tuple(range(start, end)), tuple(ids), tokenizer.decode(list(ids[start:end])))


def _around(text: str, place: tuple[int, int]) -> str:
    start, end = max(0, place[0] - _AROUND), min(len(text), place[1] + _AROUND)
    return repr(f"{text[start : place[0]]}[{text[slice(*place)]}]{text[place[1] : end]}")


def _runs(positions: Iterable[int]) -> str:
    """``3-7, 9``."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
