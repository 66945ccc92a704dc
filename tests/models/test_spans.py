"""Every kind of tokenizer under every chat template: where the prefix stands."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import families
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from lenskit.concepts import statement_prompt
from lenskit.models import encode_with_offsets, render, tokens_of
from lenskit.models.templates import prepare_tokenizer
from lenskit.prompts import build_prompts

PREFIX = "Take on a cheerful mood."
STATEMENTS = ["Rain is better than sun.", "Libraries should stay open on Sundays, always"]
EVERY = list(product(families.TOKENIZERS, families.TEMPLATES))


@cache
def model_of(tokenizer: str, template: str) -> Any:
    """All that ``build_prompts`` needs of a model."""
    return SimpleNamespace(
        tokenizer=prepare_tokenizer(families.real_tokenizer(tokenizer, template))
    )


def letters(text: str) -> str:
    return "".join(text.split())


def real(prompts, row: int) -> list[int]:
    return prompts.tokens.input_ids[row][prompts.tokens.attention_mask[row].bool()].tolist()


def kept(tokenizer, text: str) -> str:
    """What a tokenizer that loses something keeps of a text, without blanks."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return letters(normalizer.normalize_str(text) if normalizer else text).replace("▁", "")


def require_located(model, prompts, prefix: str) -> None:
    """The marked tokens are the shortest run that decodes to the whole prefix."""
    tokenizer = model.tokenizer
    wanted = kept(tokenizer, prefix)
    for row, has_prefix in enumerate(prompts.has_prefix.tolist()):
        marked = prompts.prefix_mask[row].nonzero().flatten().tolist()
        if not has_prefix:
            assert not marked
            continue
        assert marked == list(range(marked[0], marked[-1] + 1))
        ids = prompts.tokens.input_ids[row]
        assert bool(prompts.tokens.attention_mask[row][marked].all())

        def decoded(places: list[int], ids=ids) -> str:
            text = tokenizer.decode(ids[places], clean_up_tokenization_spaces=False)
            return letters(text).replace("##", "")

        assert wanted in decoded(marked)
        assert wanted not in decoded(marked[1:]) and wanted not in decoded(marked[:-1])
        # The last prefix in the text, were it written twice, begins where these tokens do.
        assert wanted not in decoded(list(range(marked[0])))


@pytest.mark.parametrize(("tokenizer", "template"), EVERY)
def test_every_tokenizer_locates_the_prefix_under_every_template(tokenizer, template):
    model = model_of(tokenizer, template)
    prompts = build_prompts(model, PREFIX, layout="paired", statements=STATEMENTS, seed=None)
    require_located(model, prompts, PREFIX)
    for row in range(len(prompts)):
        content = statement_prompt(STATEMENTS[row // 2], "" if row % 2 else PREFIX)
        text = render(model.tokenizer, [{"role": "user", "content": content}])
        assert real(prompts, row) == encode_with_offsets(model.tokenizer, [text])[0][0]
        if tokenizer not in families.LOSSY:
            assert letters(model.tokenizer.decode(real(prompts, row))) == letters(text)
    closing = letters("".join(prompts.candidates)).lower()
    assert letters(text).lower().endswith(closing) and closing


words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="<|>▁�"),
    min_size=1,
    max_size=8,
).filter(lambda text: text.strip())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([each for each in EVERY if each[0] not in families.LOSSY]),
    words,
    words,
)
@example(("qwen", "plain"), "한국어를 말해 e\u0301tat", "\u1112\u1161\u11ab")
@example(("gpt2", "vicuna"), "👩‍👩‍👧‍👦 familia", "🏳️‍🌈")
@example(("llama 2", "llama 2"), "דבר עברית, العربية", "ש")
@example(("mistral", "mistral"), "e", "e  e")
@example(("opt", "gemma"), "a   b\n\n c", "\u3000x")
@example(("metaspace always", "chatml"), "ñandú", "x")
def test_any_prefix_is_located_by_every_tokenizer_under_every_template(each, prefix, statement):
    model = model_of(*each)
    assume(
        letters(prefix) not in letters(render(model.tokenizer, [{"role": "user", "content": ""}]))
    )
    prompts = build_prompts(model, prefix, layout="paired", statements=[statement])
    require_located(model, prompts, prefix)


def test_an_empty_part_of_the_text_has_no_tokens():
    text = "User: Take on"
    spans = [(0, 5), (5, 10), (10, 13)]
    assert tokens_of(text, spans, 6, 6) == range(0)
    assert tokens_of(text, spans, 6, 10) == range(1, 2)
    assert tokens_of(text, spans, 6, 11) == range(1, 2)
    assert tokens_of(text, spans, 10, 11) == range(0)


def test_blanks_between_words_belong_to_the_prefix_and_blanks_at_its_edges_do_not():
    text = "a  b   c d"
    trimmed = [(0, 1), (2, 2), (3, 4), (5, 5), (6, 6), (7, 8), (9, 10)]
    whole = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10)]
    for spans in (trimmed, whole):
        assert tokens_of(text, spans, 3, 8) == range(2, 6)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama 2", "mistral", "metaspace always"])
def test_a_blank_put_before_the_first_word_is_no_token_of_it(kind):
    tokenizer = families.real_tokenizer(kind)
    for text in ("Qz", "日本", "é"):
        (ids,), (spans,) = encode_with_offsets(tokenizer, [text])
        held = tokens_of(text, spans, 0, len(text))
        assert letters(tokenizer.decode(ids[held.start : held.stop])) == text
        assert letters(tokenizer.decode(ids[held.start + 1 :])) != text


def without_offsets(tokenizer):
    """The same tokenizer, as one that is written in Python."""
    slow = copy.copy(tokenizer)
    slow.__class__ = type("SlowTokenizer", (type(slow),), {"is_fast": False})
    return slow


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([kind for kind in families.TOKENIZERS if kind not in families.LOSSY]), words)
@example("llama 2", "日本 a👩‍👩‍👧 Take  é")
@example("opt", "日本 a👩‍👩‍👧 Take  é")
@example("gpt2", "0\xa0")
def test_a_tokenizer_without_offsets_finds_the_same_tokens_by_decoding(kind, text):
    tokenizer = families.real_tokenizer(kind)
    # A composing normalizer alters the text that is decoded.
    assume(kind != "qwen" or tokenizer.backend_tokenizer.normalizer.normalize_str(text) == text)
    text = f"User: {text} and more"
    fast, slow = (
        encode_with_offsets(each, [text]) for each in (tokenizer, without_offsets(tokenizer))
    )
    assert fast[0] == slow[0]
    for start in range(len(text)):
        for end in (start + 1, len(text)):
            assert tokens_of(text, slow[1][0], start, end) == tokens_of(
                text, fast[1][0], start, end
            )


def test_a_byte_tokenizer_in_python_builds_prompts():
    model = SimpleNamespace(tokenizer=prepare_tokenizer(ByT5Tokenizer()))
    prefix = "Sé alegre 👩‍👩‍👧."
    prompts = build_prompts(model, prefix, layout="paired", statements=STATEMENTS)
    for row in (0, 2):
        marked = prompts.tokens.input_ids[row][prompts.prefix_mask[row]]
        assert model.tokenizer.decode(marked) == prefix
        assert len(marked) == len(prefix.encode())
    assert not prompts.prefix_mask[1::2].any()


def test_a_replacement_character_looks_like_a_part_of_one_and_is_refused_without_offsets():
    tokenizer = families.real_tokenizer("gpt2")
    with pytest.raises(ValueError, match="decode to '.*\ufffd.*' where the text has '\ufffd"):
        encode_with_offsets(without_offsets(tokenizer), ["a\ufffdb"])
    assert encode_with_offsets(tokenizer, ["a\ufffdb"])[1] == [[(0, 1), *[(1, 2)] * 3, (2, 3)]]


def test_a_slow_tokenizer_that_loses_the_text_is_refused_with_the_reason():
    tokenizer = without_offsets(families.real_tokenizer("word piece, lowercase"))
    model = SimpleNamespace(tokenizer=prepare_tokenizer(tokenizer))
    with pytest.raises(
        ValueError, match="SlowTokenizer gives no character offsets, and its tokens"
    ):
        build_prompts(model, PREFIX, statements=STATEMENTS)


def test_a_word_of_one_letter_behind_a_special_token_is_not_trimmed_away():
    tokenizer = prepare_tokenizer(families.real_tokenizer("opt", "chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}<|im_end|>"
    )
    prompts = build_prompts(SimpleNamespace(tokenizer=tokenizer), "a", statements=STATEMENTS)
    marked = prompts.tokens.input_ids[0][prompts.prefix_mask[0]].tolist()
    assert tokenizer.convert_ids_to_tokens(marked) == ["Ġa"]
