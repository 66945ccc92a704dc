"""Text to token ids: the tokenizer of a model, its chat template, and left-padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lenskit._display import Displayed, count, spread
from lenskit.models.positions import require_positions
from lenskit.models.spans import encode

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Conversation = Sequence[Mapping[str, str]]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""What a base model, which has no chat template, is given: ``User: …`` / ``Assistant:`` lines."""

TEMPLATE_ARGUMENTS: Mapping[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What a template that knows these names is given by default.

Steering and its scores are about the answer itself, so a model that can think first (Qwen 3) is
told not to: its template then closes the thoughts before the answer, and these tokens are
candidates like any other. Llama 3.2 writes today's date into a system message; with a fixed one
(that of Llama 3.1) prompts are the same on every day.
"""

# Digits, accents, runs of spaces and line ends are where tokenizer classes disagree.
_PROBE_TEXT = "Statement 1984:  it's naïve — 北京, don’t\n\n\tyou think?\nassistant  "


@dataclass(frozen=True, repr=False)
class Tokens(Displayed):
    """Left-padded token ids with their attention mask (1 on real tokens, 0 on padding)."""

    input_ids: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.attention_mask.shape:
            raise ValueError(
                "input_ids and attention_mask must both be [prompt, pos]; "
                f"got {tuple(self.input_ids.shape)} and {tuple(self.attention_mask.shape)}"
            )
        if not bool((self.attention_mask[:, 1:] >= self.attention_mask[:, :-1]).all()):
            raise ValueError("tokens must be padded on the left: a mask goes from 0 to 1 only")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _headline(self) -> str:
        return f"Tokens of {count(len(self), 'prompt')}"

    def _rows(self) -> dict[str, object]:
        padding = 1 - self.attention_mask.float().mean().item() if len(self) else 0.0
        return super()._rows() | {
            "lengths": spread(self.lengths.tolist()),
            "padding": f"{padding:.0%}",
            "device": str(self.input_ids.device),
        }

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """The number of real tokens of each prompt."""
        return self.attention_mask.sum(dim=1)

    def to(self, device: str | torch.device) -> Tokens:
        """The same tokens on another device."""
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))

    def rows(self, index: Int[Tensor, " row"] | Sequence[int] | slice) -> Tokens:
        """The prompts at ``index``, in that order, with all columns."""
        return Tokens(self.input_ids[index], self.attention_mask[index])

    def trimmed(self) -> Tokens:
        """Without the columns that are padding in every prompt."""
        width = int(self.lengths.max()) if len(self) else 0
        start = self.input_ids.shape[1] - width
        return Tokens(self.input_ids[:, start:], self.attention_mask[:, start:])


def position_ids(attention_mask: Int[Tensor, "prompt pos"]) -> Int[Tensor, "prompt pos"]:
    """Positions counted from each prompt's first real token; 0 on the padding before it."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def pad_left(sequences: Sequence[Sequence[int]], pad_token_id: int) -> Tokens:
    """Stack id lists of different lengths, padded on the left with ``pad_token_id``."""
    width = max(len(ids) for ids in sequences)
    rows = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return Tokens(torch.tensor(rows, dtype=torch.long), torch.tensor(mask, dtype=torch.long))


def load_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that the folder's files describe, made ready by ``prepare_tokenizer``.

    ``AutoTokenizer`` picks a class by the model's config and may rebuild parts of the pipeline;
    where its ids differ from those of ``tokenizer.json``, or it fails, the file is loaded as is.
    The folder's own code is not run unless ``trust_remote_code=True`` is among ``options``.
    """
    # Given nothing, transformers would ask on the terminal.
    options["trust_remote_code"] = bool(options.get("trust_remote_code"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        tokenizer = _tokenizer_file(name_or_path, options)
        if tokenizer is None:
            raise ValueError(
                f"no tokenizer could be loaded from {name_or_path!r}: {error}. "
                "Pass tokenizer=, a Hugging Face tokenizer object."
            ) from error
        return prepare_tokenizer(tokenizer)
    literal = _tokenizer_file(name_or_path, options)
    if literal is not None and encode(literal, [_PROBE_TEXT]) != encode(tokenizer, [_PROBE_TEXT]):
        literal.chat_template = literal.chat_template or tokenizer.chat_template
        tokenizer = literal
    return prepare_tokenizer(tokenizer)


def _tokenizer_file(name: str, options: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    known = {key: value for key, value in options.items() if key in ("revision", "token")}
    try:
        return PreTrainedTokenizerFast.from_pretrained(name, **known)
    except Exception:
        # A second opinion; a folder without the file, or an odd one, is no reason to fail.
        return None


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set left padding, a pad token and, where there is none, the plain template; in place.

    Raises ``ValueError`` when there is no token to pad with, or when the template and the
    tokenizer together put two BOS tokens before a prompt.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if substitute is None:
            raise ValueError("the tokenizer has no pad, eos, unk or bos token to pad with; set one")
        tokenizer.pad_token = substitute
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _plain_template(tokenizer)
    probe = encode(tokenizer, [render(tokenizer, [{"role": "user", "content": "Hello"}])])
    bos = tokenizer.bos_token_id
    if bos is not None and probe[0][:2] == [bos, bos]:
        raise ValueError(
            f"the chat template begins every prompt with {tokenizer.bos_token!r} twice; "
            "correct tokenizer.chat_template"
        )
    return tokenizer


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """``PLAIN_TEMPLATE``, after the BOS token if this tokenizer begins its texts with one."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text in the chat template, ending where the answer begins.

    ``TEMPLATE_ARGUMENTS`` are given to a template that knows them, unless ``template_arguments``
    say otherwise. Raises ``TypeError`` for what is no list of messages, and ``ValueError`` where
    the template refuses it.
    """
    _require_messages(conversation)
    known = str(tokenizer.chat_template)
    defaults = {name: value for name, value in TEMPLATE_ARGUMENTS.items() if name in known}
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tokenize=False,
            add_generation_prompt=True,
            **{**defaults, **(template_arguments or {})},
        )
    except Exception as error:
        roles = [message["role"] for message in conversation]
        advice = (
            ". This template may know no system messages: put the text at the beginning of the "
            "user's message instead (build_prompts: system=False)"
            if "system" in roles
            else ""
        )
        raise ValueError(
            f"the chat template refuses messages ({', '.join(roles)}): {error}{advice}"
        ) from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts that this tokenizer reads as one special token wherever they stand."""
    added = tokenizer.added_tokens_decoder.values()
    named = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return {token for token in named if token}


def refuse_special(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str) -> None:
    """Raise ``ValueError`` where a text of the user's would be read as a special token.

    It would end a message or begin another, so that the prompt is not what it seems.
    """
    for token in special_tokens(tokenizer):
        if any(token in text for text in texts):
            raise ValueError(
                f"{name} contains {token!r}, which this tokenizer reads as one special token; "
                "leave it out or write it otherwise"
            )


def _require_messages(conversation: Any) -> None:
    """Raise ``TypeError`` unless this is a list of messages, each with a role and a text."""
    form = "a conversation is a list of messages, [{'role': 'user', 'content': '…'}]"
    if isinstance(conversation, str | Mapping):
        given = "one text" if isinstance(conversation, str) else "one dict"
        raise TypeError(f"{form}; got {given}, {conversation!r}")
    for message in conversation:
        texts = isinstance(message, Mapping) and [message.get(key) for key in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{form} with two texts each; got {message!r}")


def chat_ids(
    model: TransformerBridge,
    conversations: Sequence[Conversation],
    *,
    template_arguments: Mapping[str, Any] | None = None,
) -> Tokens:
    """Conversations in the model's chat template, left padded, each special token exactly once.

    Every conversation is a list of ``{"role": …, "content": …}`` and ends where the answer
    begins. ``template_arguments`` go to the template, before ``TEMPLATE_ARGUMENTS``, which switch
    thinking off (``{"enable_thinking": True}`` switches it on).
    Returns tokens ``[prompt, pos]`` on the CPU. Raises ``TypeError`` for what is no list of lists
    of messages, and ``ValueError`` for a text that contains a special token, for a conversation
    that the template refuses, and for one that is longer than the model's positions.

    >>> tokens = lk.chat_ids(model, [[{"role": "user", "content": "Hello!"}]])
    >>> len(tokens)
    1
    """
    tokens = conversation_ids(model.tokenizer, conversations, template_arguments=template_arguments)
    require_positions(model, tokens)
    return tokens


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    template_arguments: Mapping[str, Any] | None = None,
) -> Tokens:
    """``chat_ids`` for a tokenizer without its model."""
    if len(conversations) == 0:
        raise ValueError("conversations is empty; give at least one list of messages")
    if isinstance(conversations, str | Mapping):
        raise TypeError(f"conversations must be a list of lists of messages, got {conversations!r}")
    texts = [render(tokenizer, conversation, template_arguments) for conversation in conversations]
    contents = [message["content"] for conversation in conversations for message in conversation]
    refuse_special(tokenizer, contents, "a message")
    return pad_left(encode(tokenizer, texts), tokenizer.pad_token_id)
