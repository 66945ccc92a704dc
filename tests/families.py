"""Tokenizers with the settings of real ones, chat templates, and tiny folders that join both.

The settings are those that decide which characters a token covers: who owns the space before a
word, whether a blank is put before the text, and what becomes of unknown characters. Nothing is
fetched: each tokenizer is trained on a few lines.
"""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

PLAIN = None
"""No template of its own: a base model, which gets ``PLAIN_TEMPLATE``."""

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/…') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set own = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set own = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((own if loop.first else '') + m['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set own = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set own = 'A chat between a user and a helpful assistant.' %}"
    "{% set rest = messages %}{% endif %}{{ own + ' ' }}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] | trim + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA_TURNS = (
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') }}"
    "{{ '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set first = '' %}{% set rest = messages %}" + GEMMA_TURNS
)
TEMPLATES: dict[str, str | None] = {
    "plain": PLAIN,
    "chatml": CHATML,
    "llama 2": LLAMA2,
    "mistral": MISTRAL1,
    "vicuna": VICUNA,
    "llama 3": tiny.LLAMA3_TEMPLATE,
    "gemma": GEMMA2,
    "qwen": QWEN25,
}

# Each template's marks are special tokens of the tokenizers that are trained with it.
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "llama 3": tiny.SPECIAL[2:5],
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
_TEXTS = (
    "Take on a cheerful mood. Personify someone who is terrified of spiders.",
    "What are your thoughts on the following statement? \nStatement: Rain is better than sun.",
    "User: system user assistant model \nAssistant: USER: ASSISTANT: [INST] x [/INST]",
)
# Every word also behind a space, as in a text that is longer than these.
_LINES = [f"{start}{text}" for text in _TEXTS for start in ("", " ", "\n")] * 20
_SENTENCEPIECE = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _byte_level(
    *,
    trim: bool = False,
    words: str | None = None,
    prefix_space: bool = False,
    normalizer: Any = None,
) -> Tokenizer:
    """Words split as by GPT-2, or by ``words``; ``trim``: offsets leave out a token's blanks."""
    backend = Tokenizer(models.BPE())
    if words is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
            ]
        )
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    return backend


def _sentencepiece(*, prepend: str | None, pieces: str = "BPE") -> Tokenizer:
    """Byte fallback and ``▁`` for a space: who puts a blank before the text is ``prepend``.

    ``"normalizer"``: Llama 2 and Vicuna (legacy); ``"first"``: Mistral, Llama 2 (not legacy);
    ``"always"``; ``"never"``: Gemma; ``None``: Gemma's normalizer, which prepends nothing.
    """
    trained = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    # Without a pre-tokenizer, whole lines would be learned as tokens.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=3 + 256 + 400,
        special_tokens=[*_SENTENCEPIECE, *_BYTES],
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        show_progress=False,
    )
    trained.train_from_iterator(_LINES, trainer)
    plan = json.loads(trained.to_str())
    # The bytes are tokens of the vocabulary, which no text may spell.
    plan["added_tokens"] = plan["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(plan))
    backend.pre_tokenizer = None  # type: ignore[assignment]
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend in ("normalizer", None):
        first = [normalizers.Prepend("▁")] if prepend else []
        backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    if prepend not in ("never", None):
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    bos = ("<s>", 1)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend


def _unigram(*, prepend: str = "always") -> Tokenizer:
    """Like T5: NFKC, and words split at the metaspace."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[*map(chr, range(33, 127)), "▁"],
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    return backend


def _word_piece(*, lowercase: bool) -> Tokenizer:
    """Like BERT: blanks are lost, accents and cases too where ``lowercase``."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=[*map(chr, range(33, 127)), "é"],
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    return backend


_MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (_byte_level, {}),
    "gpt2, trimmed": (_byte_level, {"trim": True}),
    "gpt2, prefix space": (_byte_level, {"prefix_space": True}),
    "opt": (_byte_level, {"trim": True, "prefix_space": True}),
    "llama 3": (_byte_level, {"words": _GPT4}),
    "qwen": (_byte_level, {"words": _GPT4, "normalizer": normalizers.NFC()}),
    "llama 2": (_sentencepiece, {"prepend": "normalizer"}),
    "mistral": (_sentencepiece, {"prepend": "first"}),
    "metaspace always": (_sentencepiece, {"prepend": "always"}),
    "metaspace never": (_sentencepiece, {"prepend": "never"}),
    "gemma": (_sentencepiece, {"prepend": None}),
    "unigram": (_unigram, {}),
    "word piece": (_word_piece, {"lowercase": False}),
    "word piece, lowercase": (_word_piece, {"lowercase": True}),
}
TOKENIZERS = tuple(_MADE)
# Both lose characters: blanks, cases, accents or compatibility forms.
LOSSY = ("unigram", "word piece", "word piece, lowercase")


@cache
def _trained(kind: str) -> str:
    make, settings = _MADE[kind]
    return make(**settings).to_str()


def real_tokenizer(kind: str, template: str = "plain") -> PreTrainedTokenizerFast:
    """A tokenizer with the settings of a real one (``TOKENIZERS``) and a template's marks."""
    backend = Tokenizer.from_str(_trained(kind))
    if kind.startswith("word piece"):
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    elif "<s>" in backend.get_vocab():
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(MARKS.get(template, ())),
        **names,
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


# architecture, tokenizer, template, the class that a real folder names
REAL_STYLES = {
    "gpt2": ("gpt2", "gpt2", "plain", "GPT2Tokenizer"),
    "opt": ("opt", "opt", "plain", "GPT2Tokenizer"),
    "llama 2": ("llama", "llama 2", "llama 2", "LlamaTokenizer"),
    "vicuna": ("llama", "llama 2", "vicuna", "LlamaTokenizer"),
    "mistral": ("mistral", "mistral", "mistral", "LlamaTokenizer"),
    "metaspace": ("llama-gqa", "metaspace always", "plain", "PreTrainedTokenizerFast"),
}


@cache
def real_style_folder(name: str) -> Path:
    """A tiny random model with a tokenizer and template like a real one's, made once.

    ``name`` is a key of ``REAL_STYLES``: "gpt2", "llama 2", "mistral", "metaspace" and others.
    """
    architecture, kind, template, tokenizer_class = REAL_STYLES[name]
    path = Path(tempfile.mkdtemp(prefix="lenskit-")) / f"tiny-{name.replace(' ', '-')}"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    tokenizer = real_tokenizer(kind, template)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny.tiny_folder(
        path, architecture, tokenizer=tokenizer, vocab_size=len(tokenizer), pad_token_id=None, **ids
    )
    settings = path / "tokenizer_config.json"
    described = json.loads(settings.read_text()) | {"tokenizer_class": tokenizer_class}
    settings.write_text(json.dumps(described))
    return path


if __name__ == "__main__":
    # python tests/families.py FOLDER NAME ...: random models to try lenskit on
    for name in sys.argv[2:]:
        made = real_style_folder(name)
        shutil.copytree(made, Path(sys.argv[1]) / made.name)
