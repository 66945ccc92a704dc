"""The embedded model's tokenizer: a byte-level BPE with a chat template in the style of Llama 3."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lenskit.embedded.dialogue import Dialogue

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# Newlines stay together, so that the header's blank line is one token whatever text follows it.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def chat_text(dialogue: Dialogue) -> str:
    """The text of a whole dialogue under the chat template."""
    return SPECIAL_TOKENS[1] + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
        for m in dialogue.messages
    )


def train_tokenizer(
    dialogues: Iterable[Dialogue], vocabulary: int = 6144
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocabulary`` tokens learnt from the messages of ``dialogues``.

    Raises ValueError when the texts are too few for the template's own words to be single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{m['role']}\n\n{m['content']}" for d in dialogues for m in d.messages)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    for word in ("user", "assistant", "system", "\n\n"):
        if len(fast.encode(word, add_special_tokens=False)) != 1:
            raise ValueError(
                f"{word!r} is not a single token of the {len(fast)}; train on more dialogues, "
                f"or for a vocabulary above {vocabulary}"
            )
    return fast
