"""Prompts with and without a concept's prefix, as tokens in which every part is located."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit._display import Displayed, count, quoted, spread
from lenskit.concepts import Concept, statement_prompt
from lenskit.concepts import statements as grammar_statements
from lenskit.models import (
    Conversation,
    Tokens,
    encode_with_offsets,
    pad_left,
    render,
    special_tokens,
    tokens_of,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Rows = Int[Tensor, " row"] | Bool[Tensor, " prompt"] | Sequence[int]


@dataclass(frozen=True, repr=False)
class PromptSet(Displayed):
    """Prompts of one concept, left padded; all of them end in the same candidate tokens.

    ``prefix_mask`` is true on the prefix tokens (nowhere in a prompt without prefix).
    ``candidates`` are the closing tokens of the template in text order, the last one token -1.
    ``pair``: the index of the prompt with the same statement in the other condition, or -1.
    """

    concept: Concept
    tokens: Tokens
    prefix_mask: Bool[Tensor, "prompt pos"]
    has_prefix: Bool[Tensor, " prompt"]
    candidates: tuple[str, ...]
    statements: tuple[str, ...]
    pair: Int[Tensor, " prompt"]

    def __post_init__(self) -> None:
        if self.prefix_mask.shape != self.tokens.input_ids.shape:
            raise ValueError(
                f"prefix_mask must have the shape of the tokens, "
                f"{tuple(self.tokens.input_ids.shape)}; got {tuple(self.prefix_mask.shape)}"
            )
        closing = self.tokens.input_ids[:, -len(self.candidates) :]
        if not self.candidates or bool((closing != closing[:1]).any()):
            raise ValueError(
                f"the prompts do not all end in the {len(self.candidates)} candidate tokens "
                f"{self.candidates}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def _headline(self) -> str:
        return f"PromptSet of {self.concept.name!r}, {count(len(self), 'prompt')}"

    def _rows(self) -> dict[str, object]:
        spans = self.prefix_mask[self.has_prefix].sum(dim=1)
        return {
            "prefix": self.concept.prefix,
            "with it": count(int(self.has_prefix.sum()), "prompt"),
            "prefix tokens": spread(spans.tolist()),
            "tokens": f"prompt {len(self)} × pos {self.tokens.input_ids.shape[1]}",
            "lengths": spread(self.tokens.lengths.tolist()),
            "candidates": quoted(self.candidates),
            "pairs": int((self.pair >= 0).sum()) // 2,
            "statements": quoted(self.statements[:2]),
        }

    def rows(self, index: Rows) -> PromptSet:
        """Some of the prompts, in the order of ``index`` (a mask keeps theirs).

        A prompt whose partner is left out has the pair -1.
        """
        rows = row_index(index, len(self))
        # The last place stands for -1, «no partner», which must stay -1.
        place = torch.full((len(self) + 1,), -1, dtype=torch.long)
        place[rows] = torch.arange(len(rows))
        return PromptSet(
            self.concept,
            self.tokens.rows(rows),
            self.prefix_mask[rows],
            self.has_prefix[rows],
            self.candidates,
            tuple(self.statements[row] for row in rows.tolist()),
            place[self.pair[rows]],
        )


def with_separator(model: TransformerBridge, prompts: PromptSet) -> PromptSet:
    """The same prompts, whose prefix also spans the tokens of the white space after it.

    AGS's own code counts them: its span runs up to the first token of the statement prompt.
    """
    mask = prompts.prefix_mask.clone()
    for ids, row in zip(prompts.tokens.input_ids, mask, strict=True):
        place = int(row.nonzero()[-1]) + 1 if bool(row.any()) else len(row)
        # Beside the token before it, since a tokenizer may drop a space that opens a text.
        while place < len(row):
            last = model.tokenizer.decode(ids[place - 1 : place])
            both = model.tokenizer.decode(ids[place - 1 : place + 1])
            if not both.startswith(last) or both[len(last) :].strip():
                break
            row[place] = True
            place += 1
    return replace(prompts, prefix_mask=mask)


def row_index(index: Rows, length: int) -> Int[Tensor, " row"]:
    """Indices from indices or from a mask over ``length`` prompts; negative ones from the end."""
    rows = torch.as_tensor(index)
    if rows.dtype == torch.bool:
        if rows.shape != (length,):
            raise ValueError(f"a mask over {length} prompts was expected, got {tuple(rows.shape)}")
        return rows.nonzero().flatten()
    if rows.numel() and (rows.is_floating_point() or rows.is_complex()):
        raise ValueError(f"rows must be whole numbers or a mask, got {rows.tolist()}")
    rows = rows.long().flatten()
    if bool(((rows < -length) | (rows >= length)).any()):
        raise IndexError(f"rows must be from 0 to {length - 1}, got {rows.tolist()}")
    return rows % max(length, 1)


def build_prompts(
    model: TransformerBridge,
    concept: Concept | str,
    *,
    number: int | None = None,
    layout: Literal["split", "paired"] = "split",
    statements: Sequence[str] | None = None,
    system: bool = False,
    seed: int | None = 0,
    template_arguments: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Prompts about statements, every other one with the concept's prefix (AGS, section 3).

    ``number`` of prompts: 400, or as many as the statements allow.
    ``layout="split"``: prompts with the prefix use one half of the statements, those without it
    the other half. ``"paired"``: each statement with the prefix and then without.
    ``statements``: your own instead of the grammar's (split: their first half gets the prefix).
    ``system``: the prefix is a system message instead of opening the user's text.
    ``seed`` draws which statements are used and their order; ``None`` keeps the given order.
    ``template_arguments`` go to the chat template; thinking is off where it can be switched off
    (``lenskit.templates.TEMPLATE_ARGUMENTS``).

    Raises ``ValueError`` when the template refuses, removes or alters the text, when the prefix
    spans no token, or when the prompts do not end in the same tokens.

    >>> prompts = lk.build_prompts(model, lk.concepts["fears"]["spiders"], number=40)
    >>> prompts.has_prefix[:4]
    tensor([ True, False,  True, False])
    >>> own = lk.build_prompts(model, "Personify someone who loves tea.", layout="paired")
    """
    concept = Concept(prefix=concept) if isinstance(concept, str) else concept
    prefix = concept.prefix.strip()
    tokenizer = model.tokenizer
    with_prefix, without = _choose(number, layout, statements, seed)
    if not prefix:
        raise ValueError("the concept's prefix is empty; give the words that activate it")
    _refuse_special(tokenizer, [prefix], "the prefix")
    _refuse_special(tokenizer, [*with_prefix, *without], "a statement")

    def render_messages(messages: Conversation) -> str:
        return render(tokenizer, messages, template_arguments)

    rows = []
    for positive, negative in zip(with_prefix, without, strict=True):
        rows.append(_locate(render_messages, _messages(prefix, positive, system), prefix))
        rows.append(_locate(render_messages, _messages("", negative, system), ""))
    ids, offsets = encode_with_offsets(tokenizer, [row.text for row in rows])
    tokens = pad_left(ids, tokenizer.pad_token_id)

    mask = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for i, (row, spans) in enumerate(zip(rows, offsets, strict=True)):
        held = tokens_of(row.text, spans, *row.prefix)
        first = mask.shape[1] - len(spans)
        mask[i, first + held.start : first + held.stop] = True
    has_prefix = torch.arange(len(rows)) % 2 == 0
    if not bool((mask.any(dim=1) == has_prefix).all()):
        raise ValueError(f"the prefix {prefix!r} spans no token of this model's tokenizer")
    closing = _closing(ids, offsets, [row.end for row in rows])
    names = tuple(tokenizer.decode([token]) for token in closing)
    both = [statement for pair in zip(with_prefix, without, strict=True) for statement in pair]
    other = torch.arange(len(rows)) ^ 1
    pair = other if layout == "paired" else torch.full_like(other, -1)
    return PromptSet(concept, tokens, mask, has_prefix, names, tuple(both), pair)


def _choose(
    number: int | None, layout: str, given: Sequence[str] | None, seed: int | None
) -> tuple[list[str], list[str]]:
    """The statements for the prompts with and without the prefix, ``number / 2`` each."""
    if layout not in ("split", "paired"):
        raise ValueError(f"layout must be 'split' or 'paired', got {layout!r}")
    if given is None:
        first, second = list(grammar_statements("first")), list(grammar_statements("second"))
    else:
        if isinstance(given, str):
            raise ValueError("statements must be a sequence of strings, got one string")
        first, second = list(given[: len(given) // 2]), list(given[len(given) // 2 :])
    halves = [first + second] if layout == "paired" else [first, second]
    most = 2 * min(len(half) for half in halves)
    number = min(400, most) if number is None else number
    if number < 2 or number % 2 or number > most:
        raise ValueError(
            f"number must be even, at least 2 and at most {most} with these statements "
            f"(layout={layout!r}); got {number}"
        )
    if seed is not None:
        generator = random.Random(seed)
        halves = [generator.sample(half, len(half)) for half in halves]
    chosen = [half[: number // 2] for half in halves]
    return chosen[0], chosen[-1]


def _messages(prefix: str, statement: str, system: bool) -> Conversation:
    text = statement_prompt(statement, "" if system else prefix).strip()
    user = {"role": "user", "content": text}
    return [{"role": "system", "content": prefix}, user] if system and prefix else [user]


@dataclass(frozen=True)
class _Located:
    """A rendered prompt: the characters of its prefix, and where the user's text ends."""

    text: str
    prefix: tuple[int, int]
    end: int


def _locate(
    render_messages: Callable[[Conversation], str], messages: Conversation, prefix: str
) -> _Located:
    """Render one prompt, and find its parts from the template rather than in the text.

    The template is rendered a second time with marks in place of the contents, which cannot be
    mistaken for anything else. What stands around the marks must stand around the contents.
    """
    contents = [message["content"] for message in messages]
    marks = [f"mark{i}qzx{i}kram" for i in range(len(contents))]
    text = render_messages(messages)
    frame = render_messages(
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
    if not contents[0].startswith(prefix):
        raise ValueError(f"{contents[0]!r} does not begin with the prefix {prefix!r}")
    return _Located(text, (starts[0], starts[0] + len(prefix)), starts[-1] + len(contents[-1]))


def _refuse_special(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str) -> None:
    for token in special_tokens(tokenizer):
        if any(token in text for text in texts):
            raise ValueError(f"{name} contains {token!r}, which this tokenizer reads as one token")


def _closing(
    ids: Sequence[Sequence[int]],
    offsets: Sequence[Sequence[tuple[int, int]]],
    ends: Sequence[int],
) -> list[int]:
    """The longest run of tokens that ends every prompt and lies after the user's text."""
    shared: list[int] = []
    for place in range(1, min(len(row) for row in ids) + 1):
        same = len({row[-place] for row in ids}) == 1
        after = all(spans[-place][0] >= end for spans, end in zip(offsets, ends, strict=True))
        if not (same and after):
            break
        shared.insert(0, ids[0][-place])
    if not shared:
        raise ValueError(
            "the prompts share no token after the user's text, so there are no candidate tokens; "
            "the chat template must write something there (add_generation_prompt)"
        )
    return shared
