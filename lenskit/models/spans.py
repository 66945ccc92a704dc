"""Which characters of a text each of its tokens holds, for every kind of tokenizer.

A token belongs to a part of the text if it holds at least one character of it that is no blank,
or stands between two such tokens. So a token that straddles the edge belongs to it, blanks at the
edge alone do not count, and an empty part has no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# What bytes decode to that are not yet a character.
_PART = "\ufffd"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of templated texts. No special token is added: the template wrote them all."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[list[list[int]], list[list[Span]]]:
    """The ids of ``encode``, and from which to which character of its text each token stands.

    Blanks may be left out of a span; a token that holds nothing else has an empty one. Where a
    tokenizer gives no offsets, as those written in Python, or offsets that leave letters out, it
    is asked what its tokens decode to. Raises ``ValueError`` where that does not spell the text,
    blanks aside.
    """
    if not tokenizer.is_fast:
        ids = encode(tokenizer, texts)
        return ids, [_decoded(tokenizer, *each) for each in zip(ids, texts, strict=True)]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    spans = []
    for row, given, text in zip(ids, encoded["offset_mapping"], texts, strict=True):
        missing = _left_out(tokenizer, text, given)
        try:
            spans.append(
                _decoded(tokenizer, row, text)
                if missing
                else _without_added_blanks(tokenizer, row, given)
            )
        except ValueError as error:
            raise ValueError(
                f"this tokenizer leaves {missing!r} out of {text!r}: it has no token for it, or "
                "gives it no place; write the text otherwise, or use another tokenizer"
            ) from error
    return ids, spans


def tokens_of(text: str, spans: Sequence[Span], start: int, end: int) -> range:
    """The tokens of ``text[start:end]``; none where it is blank."""
    held = [
        max(left, start) < min(right, end)
        and not text[max(left, start) : min(right, end)].isspace()
        for left, right in spans
    ]
    if not any(held):
        return range(0)
    return range(held.index(True), len(held) - held[::-1].index(True))


def _left_out(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> str:
    """The characters that no token holds though the tokenizer's normalizer does not explain it.

    It may drop accents or control characters, and joins a letter with the marks or the parts of a
    syllable behind it; the place is then that of the first. A vocabulary that lacks a character
    drops it too, and what follows is said to stand in its place, so that no place can be trusted.
    """
    covered = {place for left, right in spans for place in range(left, right)}
    missing, base = "", 0
    for place, character in enumerate(text):
        if place in covered or character.isspace():
            base = place
        elif _normalized(tokenizer, text[base : place + 1]) > _normalized(
            tokenizer, text[base:place]
        ):
            missing += character
    unknown = [one for one in dict.fromkeys(text) if missing and not encode(tokenizer, [one])[0]]
    return "".join(one for one in unknown if not one.isspace()) or missing


def _normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many letters the tokenizer's normalizer leaves of a text."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    changed = text if normalizer is None else normalizer.normalize_str(text)
    return len("".join(changed.replace("▁", " ").split()))


def _without_added_blanks(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spans: Sequence[Span]
) -> list[Span]:
    """Empty the span of a blank that was put before a word, and claims the word's first letter."""
    own = list(spans)
    for i in range(len(own) - 1):
        (left, right), following = own[i], own[i + 1]
        if left < right and following[0] == left and not _text(tokenizer, ids[i : i + 1]).strip():
            own[i] = (left, left)
    return own


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[Span]:
    """Spans from what the tokens decode to, one after the other.

    Tokens that are parts of a character are decoded together and all hold it.
    """
    places = [place for place, character in enumerate(text) if not character.isspace()]
    letters = "".join(text[place] for place in places)
    places.append(len(text))
    spans: list[Span] = []
    seen, piece = 0, ""
    for i in range(len(ids)):
        written = _text(tokenizer, ids[len(spans) : i + 1])
        piece, at = "".join(written.split()), places[seen]
        if written and not piece:
            spans += [(at, at)] * (i + 1 - len(spans))
        if not piece or _PART in piece:
            continue
        if not letters.startswith(piece, seen):
            break
        while len(spans) < i and _letters(tokenizer, ids[len(spans) + 1 : i + 1]) == piece:
            spans.append((at, at))
        seen += len(piece)
        spans += [(at, places[seen - 1] + 1)] * (i + 1 - len(spans))
    if seen < len(letters):
        rest = letters[seen : seen + max(len(piece), 1)]
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, and its tokens decode to "
            f"{piece!r} where the text has {rest!r}, so the prefix cannot be located; use a fast "
            "tokenizer (a tokenizer.json)"
        )
    return spans + [(len(text), len(text))] * (len(ids) - len(spans))


def _letters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return "".join(_text(tokenizer, ids).split())


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
