from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from families import CHATML, QWEN25
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lenskit.generation import generate
from lenskit.models import (
    chat_ids,
    conversation_ids,
    load_model,
    load_tokenizer,
    render,
    special_tokens,
)
from lenskit.models.positions import positions
from lenskit.models.templates import PLAIN_TEMPLATE, TEMPLATE_ARGUMENTS, encode, prepare_tokenizer
from lenskit.prompts import build_prompts

PREFIX = "Take on a cheerful mood."
STATEMENTS = ["Rain is better than sun.", "Libraries should stay open on Sundays, always."]
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "So?"},
]
REFUSE = "{{ raise_exception('System role not supported') }}"

# What each family's text looks like; the templates are written here, the formats are theirs.
LLAMA3 = tiny.LLAMA3_TEMPLATE
LLAMA32 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set own = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set own = '' %}{% set rest = messages %}{% endif %}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
    "{{ own + '<|eot_id|>' }}{% for m in rest %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = CHATML.replace(
    "'<|im_start|>assistant\n' }}",
    "'<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
GEMMA_TURNS = (
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') }}"
    "{{ '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}" + REFUSE + "{% endif %}"
    "{% set first = '' %}{% set rest = messages %}" + GEMMA_TURNS
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}" + GEMMA_TURNS
)
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/…') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set own = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set own = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (own if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL7 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def swallowing(token: str) -> AddedToken:
    """A special token that takes the blanks behind it, as those of Phi 3 do."""
    return AddedToken(token, rstrip=True, normalized=False, special=True)


LLAMA3_TOKENS = tiny.SPECIAL[:5]
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING = (AddedToken("<think>", special=False), AddedToken("</think>", special=False))
CHATML_CLOSING = ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
GEMMA_CLOSING = ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")
PHI3_TOKENS = (
    *("<unk>", "<s>", "</s>", "<|endoftext|>"),
    *map(swallowing, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
)
MISTRAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)

# tokenizer, special tokens, bos, eos, template, candidates, text of TURNS, text after a system
# message (None: it is refused)
FAMILIES: dict[str, tuple[str, tuple, str | None, str, str, tuple[str, ...], str, str | None]] = {
    "llama 3": (
        "byte level",
        LLAMA3_TOKENS,
        "<|begin_of_text|>",
        "<|eot_id|>",
        LLAMA3,
        tiny.CLOSING,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
    ),
    "llama 3.2": (
        "byte level",
        LLAMA3_TOKENS,
        "<|begin_of_text|>",
        "<|eot_id|>",
        LLAMA32,
        tiny.CLOSING,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
    ),
    "chatml": (
        "byte level",
        CHATML_TOKENS,
        None,
        "<|im_end|>",
        CHATML,
        CHATML_CLOSING,
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n",
    ),
    "qwen 2.5": (
        "byte level",
        CHATML_TOKENS,
        None,
        "<|im_end|>",
        QWEN25,
        CHATML_CLOSING,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n",
    ),
    "qwen 3": (
        "byte level",
        (*CHATML_TOKENS, *THINKING),
        None,
        "<|im_end|>",
        QWEN3,
        (*CHATML_CLOSING, "<think>", "\n\n", "</think>", "\n\n"),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n",
    ),
    "gemma 2": (
        "gemma",
        GEMMA_TOKENS,
        "<bos>",
        "<eos>",
        GEMMA2,
        GEMMA_CLOSING,
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause.<end_of_turn>\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n",
        None,
    ),
    "gemma 3": (
        "gemma",
        GEMMA_TOKENS,
        "<bos>",
        "<eos>",
        GEMMA3,
        GEMMA_CLOSING,
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause.<end_of_turn>\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe kind.\n\nWhy?<end_of_turn>\n",
    ),
    "mistral 0.1": (
        "llama 2",
        MISTRAL_TOKENS[:3],
        "<s>",
        "</s>",
        MISTRAL1,
        ("[/INST]",),
        "<s>[INST] Why? [/INST]Because.</s>[INST] So? [/INST]",
        None,
    ),
    "mistral 0.3": (
        "llama 2",
        MISTRAL_TOKENS,
        "<s>",
        "</s>",
        MISTRAL3,
        ("[/INST]",),
        "<s>[INST] Why?[/INST] Because.</s>[INST] So?[/INST]",
        "<s>[INST] Why?[/INST] Because.</s>[INST] Be kind.\n\nSo?[/INST]",
    ),
    "mistral small": (
        "byte level",
        MISTRAL_TOKENS,
        "<s>",
        "</s>",
        MISTRAL7,
        ("[/INST]",),
        "<s>[INST]Why?[/INST]Because.</s>[INST]So?[/INST]",
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Why?[/INST]",
    ),
    "phi 3": (
        "llama 2",
        PHI3_TOKENS,
        "<s>",
        "<|endoftext|>",
        PHI3,
        ("<|end|>", "<|assistant|>"),
        "<|user|>\nWhy?<|end|>\n<|assistant|>\nBecause.<|end|>\n"
        "<|user|>\nSo?<|end|>\n<|assistant|>\n",
        "<|system|>\nBe kind.<|end|>\n<|user|>\nWhy?<|end|>\n",
    ),
    "phi 4": (
        "byte level",
        (*CHATML_TOKENS, "<|im_sep|>"),
        "<|endoftext|>",
        "<|im_end|>",
        PHI4,
        ("<|im_end|>", "<|im_start|>", "assistant", "<|im_sep|>"),
        "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>Because.<|im_end|>"
        "<|im_start|>user<|im_sep|>So?<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>",
    ),
}
WITH_SYSTEM = [name for name, family in FAMILIES.items() if family[-1] is not None]
WITHOUT_SYSTEM = [name for name, family in FAMILIES.items() if family[-1] is None]
# Their tokenizers put a BOS before every text that is not a chat.
ADD_BOS = ["llama 3", "llama 3.2", "gemma 2", "gemma 3", "mistral 0.1", "mistral 0.3", "phi 3"]


@cache
def trained(kind: str, special: tuple[str, ...]) -> str:
    """A byte-pair tokenizer built like that of a family, with special tokens and common words."""
    if kind == "byte level":
        backend = Tokenizer(models.BPE(ignore_merges=True))
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        blank = normalizers.Replace(" ", "▁")
        starts = [normalizers.Prepend("▁")] if kind == "llama 2" else []
        backend.normalizer = normalizers.Sequence([*starts, blank])
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "llama 2":
            steps.append(decoders.Strip(content=" ", left=1))
        backend.decoder = decoders.Sequence(steps)
        # Without a pre-tokenizer, whole lines would be learned as tokens.
        backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
        alphabet = [*map(chr, range(33, 127)), "▁", "\n"]
    bytes_too = [f"<0x{byte:02X}>" for byte in range(256)] if kind != "byte level" else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(bytes_too) + 420,
        special_tokens=[*special, *bytes_too],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    roles = ("system", "user", "assistant", "model", "\n\n") * 60
    backend.train_from_iterator([*roles, *(f"{PREFIX} {text}" for text in STATEMENTS * 9)], trainer)
    return backend.to_str()


def tokenizer_of(family: str, *, prepared: bool = True) -> PreTrainedTokenizerFast:
    kind, special, bos, eos, template, *_ = FAMILIES[family]
    plain = tuple(str(token) for token in special)
    names = ("<unk>",) if kind != "byte level" and "<unk>" not in plain else ()
    backend = Tokenizer.from_str(trained(kind, (*plain, *names)))
    backend.add_tokens([token for token in special if isinstance(token, AddedToken)])
    if family in ADD_BOS:
        first = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=first
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[
            token for token in special if not (isinstance(token, AddedToken) and not token.special)
        ],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return prepare_tokenizer(tokenizer) if prepared else tokenizer


def model_of(family: str) -> Any:
    """All that ``build_prompts`` and ``chat_ids`` need of a model."""
    return SimpleNamespace(tokenizer=tokenizer_of(family))


def real(prompts, row: int) -> list[int]:
    return prompts.tokens.input_ids[row][prompts.tokens.attention_mask[row].bool()].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_written_as_the_family_writes_them(family):
    assert render(tokenizer_of(family), TURNS) == FAMILIES[family][6]


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_a_system_message_is_written_as_the_family_writes_it(family):
    assert render(tokenizer_of(family), [SYSTEM, *TURNS]).startswith(FAMILIES[family][7])


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_the_closing_tokens_of_each_family(family):
    prompts = build_prompts(model_of(family), PREFIX, statements=STATEMENTS)
    if family == "mistral 0.1":
        # Not special there, and its first blank belongs to the template.
        assert "".join(prompts.candidates).strip() == "[/INST]"
    else:
        assert prompts.candidates == FAMILIES[family][5]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_template_around_the_prefix_and_the_statement(family):
    model = model_of(family)
    prompts = build_prompts(model, PREFIX, layout="paired", statements=STATEMENTS, seed=None)
    for row in range(len(prompts)):
        prefix = f"{PREFIX}  " if prompts.has_prefix[row] else ""
        content = (
            f"{prefix}What are your thoughts on the following statement? \n"
            f"Statement: {prompts.statements[row]}"
        )
        text = render(model.tokenizer, [{"role": "user", "content": content}])
        assert content in text
        assert real(prompts, row) == encode(model.tokenizer, [text])[0]
        marked = prompts.tokens.input_ids[row][prompts.prefix_mask[row]]
        # A token may hold the blanks around the prefix too.
        expected = PREFIX if prompts.has_prefix[row] else ""
        assert model.tokenizer.decode(marked).strip() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
def test_ids_are_those_of_hugging_faces_own_chat_template(family, turns):
    tokenizer = tokenizer_of(family)
    theirs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, **TEMPLATE_ARGUMENTS
    )
    assert conversation_ids(tokenizer, [turns]).input_ids[0].tolist() == theirs["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_special_token_is_doubled_or_lost(family):
    tokenizer = tokenizer_of(family)
    if family in ADD_BOS:
        assert tokenizer("Why?")["input_ids"][0] == tokenizer.bos_token_id
    ids = conversation_ids(tokenizer, [TURNS[:1], TURNS])
    for row, turns in enumerate((TURNS[:1], TURNS)):
        text = render(tokenizer, turns)
        kept = ids.input_ids[row][ids.attention_mask[row].bool()].tolist()
        for token in special_tokens(tokenizer):
            assert kept.count(tokenizer.convert_tokens_to_ids(token)) == text.count(token)
        if tokenizer.bos_token and tokenizer.bos_token in text:
            assert kept.count(tokenizer.bos_token_id) == 1 and kept[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_the_prefix_may_stand_in_a_system_message(family):
    model = model_of(family)
    prompts = build_prompts(
        model, PREFIX, layout="paired", statements=STATEMENTS, system=True, seed=None
    )
    system = {"role": "system", "content": PREFIX}
    statement = "What are your thoughts on the following statement? \nStatement: " + STATEMENTS[0]
    user = {"role": "user", "content": statement}
    texts = [render(model.tokenizer, [system, user]), render(model.tokenizer, [user])]
    assert [real(prompts, row) for row in (0, 1)] == encode(model.tokenizer, texts)
    marked = prompts.tokens.input_ids[0][prompts.prefix_mask[0]]
    assert model.tokenizer.decode(marked).strip() == PREFIX
    assert not prompts.prefix_mask[1].any()
    if family != "mistral 0.1":
        assert prompts.candidates == FAMILIES[family][5]


@pytest.mark.parametrize("family", WITHOUT_SYSTEM)
def test_a_family_without_system_messages_says_what_to_do_instead(family):
    model = model_of(family)
    advice = r"refuses messages \(system, user\).*system=False"
    with pytest.raises(ValueError, match=advice):
        build_prompts(model, PREFIX, statements=STATEMENTS, system=True)
    with pytest.raises(ValueError, match=advice):
        chat_ids(model, [[SYSTEM, TURNS[0]]])
    assert len(build_prompts(model, PREFIX, statements=STATEMENTS)) == 2


def test_another_refusal_gives_no_advice_on_system_messages():
    with pytest.raises(ValueError, match="user, user.*must alternate") as caught:
        render(tokenizer_of("mistral 0.1"), [TURNS[0], TURNS[0]])
    assert "system" not in str(caught.value)


def test_thinking_is_off_unless_it_is_asked_for():
    tokenizer = tokenizer_of("qwen 3")
    closed, opened = "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"
    assert render(tokenizer, TURNS).endswith(opened + closed)
    assert render(tokenizer, TURNS, {"enable_thinking": False}).endswith(opened + closed)
    assert render(tokenizer, TURNS, {"enable_thinking": True}).endswith(opened)
    model = SimpleNamespace(tokenizer=tokenizer)
    thinking = build_prompts(
        model, PREFIX, statements=STATEMENTS, template_arguments={"enable_thinking": True}
    )
    assert thinking.candidates == CHATML_CLOSING


def test_generation_does_not_think_by_default():
    folder = tiny.shared_folder("qwen3")
    template = tiny.LLAMA3_TEMPLATE.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}",
    )
    tokenizer = tiny.tiny_tokenizer(template=template)
    model = load_model(folder, device="cpu", check=False, tokenizer=tokenizer)
    seen = []

    def read(value, hook):
        seen.append(value.shape[1])

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", read)]):
        generate(model, "Why?", max_new_tokens=1)
        generate(model, "Why?", max_new_tokens=1, template_arguments={"enable_thinking": True})
    arguments = ({}, {"enable_thinking": True})
    texts = [render(tokenizer, [{"role": "user", "content": "Why?"}], each) for each in arguments]
    assert texts[0] == texts[1] + "<think></think>"
    assert seen == [len(ids) for ids in encode(tokenizer, texts)]


def test_todays_date_does_not_change_the_prompts():
    assert "26 Jul 2024" in render(tokenizer_of("llama 3.2"), TURNS)
    assert "1 May 1990" in render(tokenizer_of("llama 3.2"), TURNS, {"date_string": "1 May 1990"})


def test_a_template_is_given_only_the_arguments_it_knows(monkeypatch):
    given = []

    def apply(conversation, **arguments):
        given.append(set(arguments) & set(TEMPLATE_ARGUMENTS))
        return ""

    for family in ("chatml", "qwen 3", "llama 3.2"):
        tokenizer = tokenizer_of(family)
        monkeypatch.setattr(tokenizer, "apply_chat_template", apply)
        render(tokenizer, TURNS)
    assert given == [set(), {"enable_thinking"}, {"date_string"}]


@pytest.mark.parametrize("family", ["llama 3", "gemma 3", "mistral 0.3", "phi 3"])
def test_a_base_model_of_each_kind_gets_the_plain_template(family):
    tokenizer = tokenizer_of(family, prepared=False)
    tokenizer.chat_template = None
    model = SimpleNamespace(tokenizer=prepare_tokenizer(tokenizer))
    assert tokenizer.chat_template.endswith(PLAIN_TEMPLATE)
    prompts = build_prompts(model, PREFIX, statements=STATEMENTS)
    assert "".join(prompts.candidates).strip().endswith("Assistant:")
    assert real(prompts, 0).count(tokenizer.bos_token_id) == 1
    assert real(prompts, 0)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", ["llama 3", "gemma 2", "mistral 0.3", "phi 3", "qwen 3"])
def test_a_tokenizer_is_the_same_after_it_was_saved_and_loaded(family, tmp_path):
    written = tokenizer_of(family, prepared=False)
    written.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert render(loaded, TURNS) == FAMILIES[family][6]
    ids = conversation_ids(loaded, [TURNS]).input_ids
    assert torch.equal(ids, conversation_ids(tokenizer_of(family), [TURNS]).input_ids)


def test_a_tokenizer_in_python_works_for_chats():
    tokenizer = prepare_tokenizer(ByT5Tokenizer())
    tokens = chat_ids(SimpleNamespace(tokenizer=tokenizer), [TURNS[:1], TURNS])
    assert tokenizer.decode(tokens.input_ids[1]) == render(tokenizer, TURNS)
    assert tokens.lengths[0] < tokens.lengths[1]


@pytest.mark.parametrize("lost", [range(1000), range(3, 9), range(5, 6)])
def test_offsets_that_leave_out_letters_are_replaced_by_what_the_tokens_decode_to(lost):
    tokenizer = copy.copy(tokenizer_of("llama 3"))
    whole = build_prompts(SimpleNamespace(tokenizer=tokenizer), PREFIX, statements=STATEMENTS)

    class WithoutOffsets(type(tokenizer)):
        def __call__(self, *arguments, **options):
            encoded = super().__call__(*arguments, **options)
            if "offset_mapping" in encoded:
                encoded["offset_mapping"] = [
                    [(0, 0) if i in lost else span for i, span in enumerate(spans)]
                    for spans in encoded["offset_mapping"]
                ]
            return encoded

    tokenizer.__class__ = WithoutOffsets
    prompts = build_prompts(SimpleNamespace(tokenizer=tokenizer), PREFIX, statements=STATEMENTS)
    assert torch.equal(prompts.prefix_mask, whole.prefix_mask)


MESSAGE = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (MESSAGE, "conversations must be a list of lists of messages"),
        ("Why?", "conversations must be a list of lists of messages"),
        ([MESSAGE], "a conversation is a list of messages.*got one dict"),
        (["Why?"], "a conversation is a list of messages.*got one text, 'Why[?]'"),
        ([["Why?"]], "with two texts each; got 'Why[?]'"),
        ([[{"role": "user"}]], "with two texts each; got {'role': 'user'}"),
        ([[{"role": "user", "content": None}]], "with two texts each; got"),
        ([[{"content": "Why?"}]], "with two texts each; got"),
    ],
)
def test_what_is_no_list_of_conversations_is_refused_with_the_right_form(conversations, message):
    with pytest.raises(TypeError, match=message):
        chat_ids(model_of("llama 3"), conversations)


@pytest.mark.parametrize("family", ["llama 3", "chatml", "mistral 0.3"])
def test_a_special_token_in_a_question_is_refused(family):
    model = model_of(family)
    token = model.tokenizer.eos_token
    spelled = [{"role": "user", "content": f"Why?{token} Because"}]
    with pytest.raises(ValueError, match=f"a message contains {token!r}".replace("|", r"\|")):
        chat_ids(model, [TURNS, spelled])


def test_a_special_token_in_a_question_is_refused_by_generate_too():
    with pytest.raises(ValueError, match=r"a message contains '<\|eot_id\|>'"):
        generate(tiny.shared_model(), "Why?<|eot_id|>", max_new_tokens=1)


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("gpt2", {"n_positions": 64}, 64),
        ("llama", {"max_position_embeddings": 64}, 64),
        ("mpt", {"max_seq_len": 64, "max_position_embeddings": None}, 64),
        ("falcon-alibi", {}, None),
        ("gemma3", {"max_position_embeddings": 64}, 64),
        (
            "llama",
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            256,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 256,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            256,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 256,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            },
            256,
        ),
    ],
)
def test_positions_are_those_of_the_config_scaled_where_it_says_so(
    architecture, settings, expected
):
    family, own = (tiny.ARCHITECTURES | tiny.FURTHER)[architecture]
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**own, **settings})
    assert positions(SimpleNamespace(original_model=SimpleNamespace(config=config))) == expected


def test_questions_longer_than_the_positions_are_refused_before_anything_is_written():
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="1 of 2 prompts are too long.*512 positions"):
        generate(model, ["Why?", "Rain is better than sun. " * 100], max_new_tokens=1)
    with pytest.raises(ValueError, match="and 510 new ones.*ask for fewer new tokens"):
        generate(model, "Why?", max_new_tokens=510)
