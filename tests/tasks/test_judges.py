from __future__ import annotations

import json
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lenskit as lk
from lenskit.embedded.dialogue import user
from lenskit.tasks import (
    judge_json,
    judge_label,
    judge_pronoun_change,
    published_all_pronouns,
    published_format,
    published_prediction,
    published_pronouns,
)

CONTEXT = "Mary helps the sick. She loves her work, and her friends like her."
PROMPT = lk.tasks.TaskPrompt(
    (user(f"{CONTEXT}\nAnswer."),),
    "Answer.",
    "nurse",
    "poet",
    metadata=MappingProxyType({"entity": "Mary", "label": "nurse", "context": CONTEXT}),
)
RIGHT = '{"name": "Mary", "occupation": "nurse"}'


@pytest.mark.parametrize(
    ("answer", "form", "prediction", "mended"),
    [
        (RIGHT, 1, 1, 1),
        (f"Sure!\n{RIGHT}\nWhat else?", 1, 1, 1),
        ('{"name": "Mary", "occupation": "Registered Nurse"}', 1, 1, 1),
        ('{"name": "Mary", "occupation": "poet"}', 1, 0, 0),
        ('{"name": "Ann", "occupation": "nurse"}', 1, 1, 0),
        ("", 0, 0, 0),
        ("nurse", 0, 0, 0),
        ("{'name': 'Mary', 'occupation': 'nurse'}", 0, 0, 0),
        (RIGHT[:-1], 0, 0, 0),
        # What the published scores let through.
        ("{}", 1, 0, 0),
        ('{"a": 1}', 1, 0, 0),
        ('{"x": "a nurse or a poet"}', 1, 1, 0),
        ('{"name": "Mary", "occupation": "nursery owner"}', 1, 1, 0),
        ('{"name": "Mary", "occupation": ["nurse"]}', 1, 0, 0),
        # An inner object counts as published; the mended score takes the first whole one.
        ('{ {"name": "Mary", "occupation": "nurse"} }', 1, 1, 1),
        ("{" * 300, 0, 0, 0),
        ('{"a":' * 5000 + "1" + "}" * 5000, 1, 0, 0),
    ],
)
def test_json_scores_as_published_and_mended(answer, form, prediction, mended):
    judges = (published_format, published_prediction, judge_json)
    assert [judge(PROMPT, answer).score for judge in judges] == [form, prediction, mended]


def test_the_mended_json_score_says_why():
    reasons = {
        "": "empty",
        "Mary is a nurse.": "ill formed",
        '{"occupation": "nurse"}': "other fields",
        '{"name": "Mary", "occupation": "poet"}': "wrong content",
        RIGHT: "correct",
    }
    assert {text: judge_json(PROMPT, text).reason for text in reasons} == reasons


@given(st.text(st.sampled_from('{}[]":,1a '), max_size=14))
def test_the_published_format_score_is_that_of_every_substring(text):
    def parses(part):
        try:
            json.loads(part)
        except ValueError:
            return False
        return True

    starts = [i for i, c in enumerate(text) if c == "{"]
    ends = [i for i, c in enumerate(text) if c == "}"]
    expected = any(parses(text[a : b + 1]) for a in starts for b in ends)
    assert published_format(PROMPT, text).score == expected


@pytest.mark.parametrize(
    ("answer", "subjects", "every"),
    [
        ("They love their work.", 1, 1),
        ("She loves her work.", 0, 0),
        ("They love her work.", 1, 0),
        ("HE's here", 0, 0),
        ("they like him/herself", 1, 0),
        ("The theatre, a shed and a hero.", 1, 1),
        # Both pass on text that has changed nothing, since there is nothing in it.
        ("", 1, 1),
        ("nurse nurse nurse nurse", 1, 1),
    ],
)
def test_pronoun_scores_as_published(answer, subjects, every):
    assert published_pronouns(PROMPT, answer).score == subjects
    assert published_all_pronouns(PROMPT, answer).score == every


def test_the_mended_pronoun_score_is_conversion_rate_times_content_kept():
    right = "Mary helps the sick. They love their work, and their friends like them."
    assert judge_pronoun_change(PROMPT, right) == lk.Verdict(1, "correct")
    assert judge_pronoun_change(PROMPT, f"{right} Mary is a nurse.").score == 1
    # Two of four pronouns are converted.
    half = "Mary helps the sick. They love their work, and her friends like her."
    assert judge_pronoun_change(PROMPT, half) == lk.Verdict(0.5, "pronoun left")
    # Of the nine other words, mary helps the sick love work and friends like, four are kept.
    short = "Mary helps the sick. They"
    verdict = judge_pronoun_change(PROMPT, short)
    assert verdict.score == pytest.approx(4 / 9) and verdict.reason == "content lost"


@pytest.mark.parametrize("answer", ["", "  \n", "...", "nurse nurse nurse", "a nurse", CONTEXT])
def test_empty_degenerate_and_unchanged_text_never_passes_the_mended_pronoun_score(answer):
    assert judge_pronoun_change(PROMPT, answer).score == 0


def test_repeated_pronouns_alone_are_no_content():
    assert judge_pronoun_change(PROMPT, "they " * 30).score == 0


def test_a_context_without_pronouns_has_nothing_to_convert():
    metadata = MappingProxyType({"context": "Mary helps the sick."})
    plain = lk.tasks.TaskPrompt((user("Say it."),), "Say it.", "x", metadata=metadata)
    assert judge_pronoun_change(plain, "Mary helps the sick.").score == 1


def test_labels_are_compared_whole():
    answers = {"nurse": "correct", " nurse ": "correct", "": "empty", "poet": "span ignored"}
    answers |= {"nurse practitioner": "another label", "nur": "another label"}
    assert {text: judge_label(PROMPT, text).reason for text in answers} == answers


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("She is a nurse.", "They are a nurse."),
        ("he himself came in", "they themselves came in"),
        ("He has his own, and this is his.", "They have their own, and this is theirs."),
        ("Ask her, and give her hers.", "Ask them, and give them theirs."),
        ("We saw her in her garden.", "We saw them in their garden."),
        ("She studies, teaches and goes.", "They study, teaches and goes."),
        ("She always works; she watches.", "They always works; they watch."),
        ("She's here; he'll come.", "They're here; they'll come."),
        ("She’s been here.", "They've been here."),
        ("The theatre has a shed.", "The theatre has a shed."),
    ],
)
def test_a_text_is_told_again_with_they(text, changed):
    assert lk.tasks.with_they(text) == changed


@given(st.lists(st.sampled_from(["she ", "he ", "her ", "his. ", "the ", "is ", "Him, ", "x"])))
def test_no_gendered_pronoun_is_left_and_none_is_replaced_twice(parts):
    text = "".join(parts)
    changed = lk.tasks.with_they(text)
    assert published_all_pronouns(PROMPT, changed).score == 1
    assert lk.tasks.with_they(changed) == changed and "tthey" not in changed
