from __future__ import annotations

import pytest

from lenskit.attention import Span, span
from lenskit.models import chat_ids

QUESTION = "Answer in one word. What is rain? Rain is: rain."
TALK = [
    {"role": "system", "content": "Please answer as JSON. Rain."},
    {
        "role": "user",
        "content": "Passage: The library was open.\nPassage 2: It is closed now.\nWhy?",
    },
]


def told(model, found: Span) -> str:
    return model.tokenizer.decode([found.ids[position] for position in found.positions])


def test_a_span_holds_the_tokens_of_its_text_in_the_templated_prompt(model):
    found = span(model, QUESTION, "What is rain?")
    assert told(model, found).strip() == "What is rain?"
    tokens = chat_ids(model, [[{"role": "user", "content": QUESTION}]])
    assert list(found.ids) == tokens.input_ids[0].tolist() and found.length == len(found.ids)


def test_a_span_begins_with_the_token_that_holds_its_first_letter_and_not_the_one_before(model):
    found = span(model, "abc def", "def")
    before = span(model, "abc def", "abc")
    assert before.positions[-1] < found.positions[0]
    assert told(model, before) == "abc" and told(model, found).strip() == "def"


def test_the_same_text_twice_must_be_told_apart_and_the_message_shows_both(model):
    with pytest.raises(ValueError, match=r"occurs 2 times.*nth=0: .*\[rain\].*nth=1: .*\[rain\]"):
        span(model, QUESTION, "rain")
    first, last = span(model, QUESTION, "rain", nth=0), span(model, QUESTION, "rain", nth=-1)
    assert first.positions < last.positions
    with pytest.raises(ValueError, match="nth=2, but text='rain' occurs 2 times"):
        span(model, QUESTION, "rain", nth=2)


def test_a_missing_text_is_an_error_that_shows_the_prompt(model):
    with pytest.raises(ValueError, match="'snow' is not in the prompt.*Answer in one word"):
        span(model, QUESTION, "snow")


def test_what_the_template_writes_is_not_searched(model):
    with pytest.raises(ValueError, match="not in the prompt"):
        span(model, QUESTION, "assistant")


def test_spans_are_found_by_pattern_by_passage_by_characters_by_tokens_and_by_role(model):
    assert told(model, span(model, QUESTION, regex=r"Answer in (\w+) word")).strip() == "one"
    assert told(model, span(model, TALK, passage="Passage 2")).strip() == "It is closed now."
    assert told(model, span(model, QUESTION, characters=(0, 6))) == "Answer"
    assert span(model, QUESTION, tokens=(2, 4)).positions == (2, 3)
    assert (
        span(model, QUESTION, tokens=(-2, -1)).positions[0] == span(model, QUESTION, "A").length - 2
    )
    assert told(model, span(model, TALK, role="system")) == TALK[0]["content"]
    assert told(model, span(model, TALK, "Rain.", role="system")).strip() == "Rain."


def test_several_texts_are_a_union(model):
    both = span(model, TALK, ["answer as JSON", "Why?"])
    assert both == span(model, TALK, "answer as JSON") | span(model, TALK, "Why?") or (
        both.positions
        == (span(model, TALK, "answer as JSON") | span(model, TALK, "Why?")).positions
    )


def test_spans_of_one_prompt_have_the_operations_of_a_set(model):
    one, other = span(model, QUESTION, "in one word"), span(model, QUESTION, "one word.")
    assert {*(one | other).positions} == {*one.positions} | {*other.positions}
    assert {*(one & other).positions} == {*one.positions} & {*other.positions}
    assert {*(one - other).positions} == {*one.positions} - {*other.positions}
    with pytest.raises(ValueError, match="different prompts"):
        one | span(model, TALK, "Why?")
    with pytest.raises(ValueError, match="holds no token"):
        one - one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"text": "rain", "regex": "rain"}, "give one of"),
        ({"text": " "}, "not empty"),
        ({"text": []}, "not empty"),
        ({"regex": "("}, "no regular expression"),
        ({"characters": (5, 5)}, "must be from 0 to"),
        ({"characters": (0, 500)}, "must be from 0 to"),
        ({"tokens": (0, 500)}, "within the prompt"),
        ({"passage": "Chapter"}, "not in the prompt"),
        ({"role": "system"}, "has no message"),
        ({"characters": (6, 7)}, "holds no token.*around it"),
    ],
)
def test_a_part_that_cannot_be_meant_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        span(model, QUESTION, **options)


def test_a_special_token_in_a_message_is_refused(model):
    with pytest.raises(ValueError, match="special token"):
        span(model, "Hello <|eot_id|>", "Hello")


def test_blanks_around_a_message_do_not_move_the_span(model):
    assert span(model, f"  {QUESTION}\n", "What is rain?") == span(model, QUESTION, "What is rain?")
