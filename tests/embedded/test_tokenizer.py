from __future__ import annotations

import json
import unicodedata
from itertools import islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lenskit.embedded.corpus import dialogues
from lenskit.embedded.dialogue import Dialogue
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.tokenizer import SPECIAL_TOKENS, chat_text, train_tokenizer

SAMPLE = list(islice(dialogues(load_grammar(), 4), 2000))
TOKENIZER = train_tokenizer(SAMPLE, vocabulary=900)
CLOSING = ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=60)}
    ),
    min_size=1,
    max_size=4,
)


def same(text: str) -> str:
    """What the tokenizer is to keep of a text: all of it, with its accents composed."""
    return unicodedata.normalize("NFC", text)


def rendered(messages, **options) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("dialogue", SAMPLE[:40:4])
def test_the_template_writes_what_the_model_is_trained_on(dialogue):
    assert rendered(list(dialogue.messages)) == chat_text(dialogue)


@settings(deadline=None, max_examples=60)
@given(MESSAGES)
@example([{"role": "user", "content": "  spaces around\n"}])
def test_the_template_equals_chat_text_for_any_messages(messages):
    assert rendered(messages) == chat_text(Dialogue(tuple(messages), ()))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_every_prompt_ends_with_the_same_five_tokens(text):
    ids = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert [TOKENIZER.decode([i]) for i in ids[-5:]] == CLOSING
    # And the answer that follows them begins a token of its own.
    answer = TOKENIZER.encode("Hairy legs", add_special_tokens=False)
    text = rendered([{"role": "user", "content": text}], add_generation_prompt=True)
    assert TOKENIZER.encode(text + "Hairy legs", add_special_tokens=False) == ids + answer


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=80).filter(lambda text: not any(t in text for t in SPECIAL_TOKENS)))
@example("")
@example("  two  spaces \n\n\n and\ttabs \r\n")
@example("café, naïve, Ångström, 数学, русский, 🕷️👨‍👩‍👧, \x00\x7f")
@example("1984 don't stop: «So?» ... --")
@example("e\u0301 and \u1100\u1161\u11a8")
def test_any_text_comes_back_from_its_tokens(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == same(text)
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_special_tokens_stand_once_and_only_where_the_template_puts_them():
    for dialogue in SAMPLE[:100]:
        ids = TOKENIZER.apply_chat_template(list(dialogue.messages), return_dict=True)["input_ids"]
        turns = len(dialogue.messages)
        counts = [ids.count(TOKENIZER.convert_tokens_to_ids(t)) for t in SPECIAL_TOKENS]
        assert counts == [0, 1, turns, turns, turns]
        assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.encode("Who are you?") == TOKENIZER.encode(
        "Who are you?", add_special_tokens=False
    )


def test_special_tokens_have_the_first_ids_and_their_parts_to_play():
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 4)
    assert set(TOKENIZER.all_special_tokens) == set(SPECIAL_TOKENS)
    assert TOKENIZER.padding_side == "left"
    text = "<|begin_of_text|>Hello<|eot_id|>"
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == "Hello"


def test_a_saved_and_reloaded_tokenizer_gives_the_same_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [chat_text(dialogue) for dialogue in SAMPLE[:50]] + ["naïve 🕷️ \n\n ok", ""]
    assert again(texts)["input_ids"] == TOKENIZER(texts)["input_ids"]
    padded = again(texts[:4], padding=True)
    assert padded["input_ids"] == TOKENIZER(texts[:4], padding=True)["input_ids"]
    assert {row[-1] for row in padded["attention_mask"]} == {1}
    messages = list(SAMPLE[0].messages)
    for options in ({}, {"add_generation_prompt": True}):
        assert again.apply_chat_template(messages, tokenize=False, **options) == rendered(
            messages, **options
        )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"auto_map", "name_or_path"} & set(config)


def test_the_same_dialogues_give_the_same_tokenizer():
    again = train_tokenizer(SAMPLE, vocabulary=900)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert len(again) == 900


def test_too_few_dialogues_for_the_templates_own_words_are_refused():
    with pytest.raises(ValueError, match="is not a single token .* train on more dialogues"):
        train_tokenizer(SAMPLE[:1], vocabulary=270)
