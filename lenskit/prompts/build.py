"""Prompts about statements, in a model's chat template, with the prefix located in the tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lenskit.concepts import Concept, statement_prompt
from lenskit.concepts import statements as grammar_statements
from lenskit.models import (
    Conversation,
    encode_with_offsets,
    locate,
    pad_left,
    refuse_special,
    render,
    require_positions,
    tokens_of,
)
from lenskit.prompts.prompt_set import PromptSet, as_concept

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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

    A token belongs to the prefix if it holds at least one character of it that is no blank, or
    stands between two such tokens; a blank before the first word is part of that word's token or
    of none.

    Raises ``ValueError`` for statements that are one string or a dict, when the template refuses,
    removes or alters the text, when a text contains a special token, when the tokenizer has no
    tokens for the prefix, when the prompts do not end in the same tokens, and when one is longer
    than the model's positions.

    >>> prompts = lk.build_prompts(model, lk.concepts["fears"]["spiders"], number=40)
    >>> prompts.has_prefix[:4]
    tensor([ True, False,  True, False])
    >>> own = lk.build_prompts(model, "Personify someone who loves tea.", layout="paired")
    """
    concept = as_concept(concept)
    prefix = concept.prefix.strip()
    tokenizer = model.tokenizer
    with_prefix, without = _choose(number, layout, statements, seed)
    if not prefix:
        raise ValueError("the concept's prefix is empty; give the words that activate it")
    refuse_special(tokenizer, [prefix], "the prefix")
    refuse_special(tokenizer, [*with_prefix, *without], "a statement")

    def render_messages(messages: Conversation) -> str:
        return render(tokenizer, messages, template_arguments)

    both = [statement for pair in zip(with_prefix, without, strict=True) for statement in pair]
    has_prefix = torch.arange(len(both)) % 2 == 0
    prefixes = [prefix if has else "" for has in has_prefix.tolist()]
    rows = [
        locate(render_messages, _messages(own, statement, system))
        for own, statement in zip(prefixes, both, strict=True)
    ]
    ids, offsets = encode_with_offsets(tokenizer, [row.text for row in rows])
    tokens = pad_left(ids, tokenizer.pad_token_id)
    require_positions(model, tokens)

    mask = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for i, (row, spans, own) in enumerate(zip(rows, offsets, prefixes, strict=True)):
        # It opens the first message, whether that is the system's or the user's.
        start = row.contents[0][0]
        held = tokens_of(row.text, spans, start, start + len(own))
        first = mask.shape[1] - len(spans)
        mask[i, first + held.start : first + held.stop] = True
    if not bool((mask.any(dim=1) == has_prefix).all()):
        raise ValueError(f"this model's tokenizer has no token for the prefix {prefix!r}")
    closing = _closing(ids, offsets, [max(end for _, end in row.contents) for row in rows])
    names = tuple(tokenizer.decode([token]) for token in closing)
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
        own = _texts("statements", given)
        first, second = own[: len(own) // 2], own[len(own) // 2 :]
    halves = [first + second] if layout == "paired" else [first, second]
    most = 2 * min(len(half) for half in halves)
    number = min(400, most) if number is None else number
    if not isinstance(number, int) or number < 2 or number % 2 or number > most:
        raise ValueError(
            f"number must be even, at least 2 and at most {most} with these statements "
            f"(layout={layout!r}); got {number!r}"
        )
    if seed is not None:
        generator = random.Random(seed)
        halves = [generator.sample(half, len(half)) for half in halves]
    chosen = [half[: number // 2] for half in halves]
    return chosen[0], chosen[-1]


def _texts(name: str, given: Iterable[str]) -> list[str]:
    """A list of texts; one text or a dict, whose items would be letters or keys, is refused."""
    if isinstance(given, str | Mapping):
        kind = "one string" if isinstance(given, str) else "a dict"
        raise ValueError(f"{name} must be a list of strings, got {kind}: {given!r}")
    texts = list(given)
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"{name} must be strings that are not empty, got {wrong[0]!r}")
    return texts


def _messages(prefix: str, statement: str, system: bool) -> Conversation:
    text = statement_prompt(statement, "" if system else prefix).strip()
    user = {"role": "user", "content": text}
    return [{"role": "system", "content": prefix}, user] if system and prefix else [user]


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
