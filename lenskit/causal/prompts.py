"""Prompts and targets as token ids, and which tokens of two prompts stand for each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.attention import Span
from lenskit.causal.runs import activations
from lenskit.models import (
    Conversation,
    chat_ids,
    encode_with_offsets,
    pad_left,
    render,
    require_positions,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Groups: TypeAlias = Sequence[int | Sequence[int]]
Positions: TypeAlias = Sequence[int | Sequence[int] | Span]


@dataclass(frozen=True, repr=False)
class Noised(Displayed):
    """A prompt whose embeddings are noised: the corrupt prompt of causal tracing.

    Gaussian noise is added to what enters the first block at ``positions`` (by default all but the
    first), ``scale`` standard deviations of the prompt's own embeddings strong; the noise depends
    on ``seed`` and position alone (Meng et al., arXiv 2202.05262, which takes 3 on the subject).
    It stands wherever a prompt does.
    """

    prompt: str | Conversation | Sequence[int]
    positions: Positions | Span | None = None
    scale: float = 3.0
    seed: int = 0


Prompt: TypeAlias = str | Conversation | Sequence[int] | Noised


@dataclass(frozen=True)
class Read:
    """A prompt's token ids, and its text in the chat template where it has one.

    ``shift`` is added to what enters the first block, at the first positions.
    """

    ids: tuple[int, ...]
    text: str | None = None
    shift: Float[Tensor, "pos d_model"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def then(self, more: Sequence[int]) -> Read:
        """The same with tokens behind it."""
        return Read(self.ids + tuple(more), None, self.shift)


def read_prompt(model: TransformerBridge, prompt: Prompt, name: str) -> Read:
    """A user's message or a conversation in the chat template, or token ids as they are."""
    if isinstance(prompt, Noised):
        return _noised(model, prompt, name)
    given: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(given, Tensor):
        given = given.tolist()
    if not isinstance(given, Sequence) or not len(given):
        raise TypeError(f"{name} must be a text, a list of messages or token ids, got {prompt!r}")
    if isinstance(given[0], Mapping):
        ids = chat_ids(model, [given]).input_ids[0].tolist()
        return Read(tuple(ids), render(model.tokenizer, given))
    ids = token_ids(model, given, name)
    require_positions(model, pad_left([ids], 0))
    return Read(ids)


def token_ids(model: TransformerBridge, ids: Sequence[int], name: str) -> tuple[int, ...]:
    """Token ids that the model embeds; raises ValueError for others."""
    most = model.original_model.get_input_embeddings().weight.shape[0] - 1
    return tuple(whole(f"a token id of {name}", token, 0, most) for token in ids)


def answer_ids(
    model: TransformerBridge, prompt: Read, answer: str | Sequence[int], name: str
) -> tuple[int, ...]:
    """The tokens that an answer has behind a prompt.

    Raises ``ValueError`` for an empty one, and where no tokens spell it there.
    """
    ids = token_ids(model, answer, name) if not isinstance(answer, str) else ()
    if isinstance(answer, str) and answer:
        tokenizer = model.tokenizer
        both = () if prompt.text is None else _encoded(tokenizer, prompt.text + answer)
        ids = both[len(prompt) :] if both[: len(prompt)] == prompt.ids else ()
        if not ids:
            # Text is often cut otherwise where more follows; the model goes on from the ids it has.
            ids = _encoded(tokenizer, answer)
            if _decoded(tokenizer, prompt.ids + ids) != _decoded(tokenizer, prompt.ids) + answer:
                raise ValueError(
                    f"{name} {answer!r} cannot be put behind the prompt's last token; begin it as "
                    "the model would (often with a blank), or give its token ids"
                )
    if not ids:
        raise ValueError(f"{name} has no tokens, got {answer!r}")
    return ids


def counterparts(prompt: Read, source: Read) -> tuple[int, int]:
    """The first position of ``prompt`` that has a counterpart in ``source``, and how far it is.

    Prompts of one length stand side by side. Of others only the tokens that both end with do.
    """
    if len(prompt) == len(source):
        return 0, 0
    alike = 0
    for one, other in zip(reversed(prompt.ids), reversed(source.ids), strict=False):
        if one != other:
            break
        alike += 1
    if not alike:
        raise ValueError(
            f"the prompts have {len(prompt)} and {len(source)} tokens and end with different ones, "
            "so that no position of one stands for one of the other; give prompts of one length"
        )
    return len(prompt) - alike, len(source) - len(prompt)


def position_groups(
    prompt: Read, positions: Positions | Span | None, first: int = 0
) -> list[tuple[int, ...]]:
    """Positions from ``first`` on, counted from the prompt's first token; negative from its end."""
    length = len(prompt)
    if positions is None:
        return [(place,) for place in range(first, length)]
    found = []
    for group in [positions] if isinstance(positions, Span) else positions:
        if isinstance(group, Span):
            require_span(prompt, group)
        one = group.positions if isinstance(group, Span) else group
        own = one if isinstance(one, Iterable) else [one]
        places = [whole("positions", place, -length, length - 1) % length for place in own]
        if not places or len(set(places)) < len(places):
            raise ValueError(f"positions must be different ones, and some; got {group!r}")
        if min(places) < first:
            raise ValueError(
                f"position {min(places)} has no counterpart: the prompts differ in length, and "
                f"have only the tokens from position {first} on in common at their ends"
            )
        found.append(tuple(places))
    if not found:
        raise ValueError("positions is empty; give at least one, or None for all")
    return found


def require_span(prompt: Read, span: Span) -> None:
    """Raise ``ValueError`` for a span of another prompt."""
    if span.ids != prompt.ids:
        raise ValueError(
            f"the span {span.text!r} is of another prompt, of {span.length} tokens, than the one "
            f"given, of {len(prompt)}"
        )


def block_groups(blocks: Groups | None, number: int) -> list[tuple[int, ...]]:
    """Blocks, or windows of blocks; by default each block alone."""
    if blocks is None:
        return [(block,) for block in range(number)]
    found = []
    for group in blocks:
        one = group if isinstance(group, Iterable) else [group]
        window = tuple(whole("blocks", block, 0, number - 1) for block in one)
        if not window or len(set(window)) < len(window):
            raise ValueError(f"blocks must be different ones, and some; got {group!r}")
        found.append(window)
    if not found:
        raise ValueError("blocks is empty; give at least one, or None for all")
    return found


def token_texts(model: TransformerBridge, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text."""
    return tuple(model.tokenizer.decode([token]) for token in torch.as_tensor(ids).tolist())


def _noised(model: TransformerBridge, prompt: Noised, name: str) -> Read:
    plain = read_prompt(model, prompt.prompt, name)
    if plain.shift is not None:
        raise TypeError(f"{name} is noised twice; give one Noised with the larger scale")
    groups = position_groups(plain, prompt.positions, min(1, len(plain) - 1))
    found: list[Tensor] = []
    activations(model, [plain], "resid_pre", lambda row, values, logits: found.append(values[0]))
    embedded = found[0].float()
    drawn = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(prompt.seed))
    spread = embedded[1:].std() if len(plain) > 1 else embedded.std()
    chosen = torch.zeros(len(plain), 1)
    chosen[[place for group in groups for place in group]] = prompt.scale
    return Read(plain.ids, plain.text, spread * (chosen * drawn).to(embedded))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(encode_with_offsets(tokenizer, [text])[0][0])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
