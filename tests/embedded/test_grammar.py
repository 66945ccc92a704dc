from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.embedded import grammar as grammar_module
from lenskit.embedded.grammar import CLASS_NAMES, HALVES, MAX_SENTENCES, load_grammar
from lenskit.embedded.judge import judge_answer

GRAMMAR = load_grammar()
RULES = list(GRAMMAR.classes.values())
EVERY_STATEMENT = [s for parts in GRAMMAR.statements.values() for h in HALVES for s in parts[h]]


def test_there_are_512_concepts_in_five_classes_of_about_a_hundred():
    assert (
        tuple(GRAMMAR.classes) == CLASS_NAMES == ("fears", "moods", "places", "experts", "personas")
    )
    assert len(GRAMMAR.entries) == 512
    assert {len(rules.entries) for rules in RULES} <= {102, 103}
    assert len({(e.concept_class, e.name) for e in GRAMMAR.entries}) == 512


@pytest.mark.parametrize("rules", RULES, ids=CLASS_NAMES)
def test_a_concept_has_six_phrases_that_no_other_of_its_class_has(rules):
    owners = Counter()
    for entry in rules.entries.values():
        phrases = {phrase.lower() for phrase in entry.phrases}
        assert len(phrases) == len(entry.phrases) >= 6, entry.name
        owners.update(phrases)
    assert [phrase for phrase, number in owners.items() if number > 1] == []


@pytest.mark.parametrize("rules", RULES, ids=CLASS_NAMES)
def test_phrases_are_plain_words_that_neither_name_the_concept_nor_hold_a_full_stop(rules):
    for entry in rules.entries.values():
        for phrase in entry.phrases:
            assert re.fullmatch(r"\w+( \w+){2,}", phrase), phrase
            assert entry.name.lower() not in phrase.lower()


def test_a_class_that_gives_a_phrase_to_two_concepts_is_refused(monkeypatch):
    read = grammar_module._toml

    def altered(*parts):
        found = read(*parts)
        if parts[-1] == "moods.toml":
            found["gloomy"]["phrases"][0] = found["cheerful"]["phrases"][2].upper()
        return found

    monkeypatch.setattr(grammar_module, "_toml", altered)
    with pytest.raises(ValueError, match=r"moods\.toml.*'gloomy' already serves 'cheerful'"):
        load_grammar.__wrapped__()


def test_statements_are_200_a_half_over_ten_topics_and_80_held_out():
    assert len(GRAMMAR.topics) == len(set(GRAMMAR.topics)) >= 8
    assert [len(GRAMMAR.half(half)) for half in HALVES] == [200, 200, 80]
    assert len({statement.lower() for statement in EVERY_STATEMENT}) == 480


def test_topics_take_turns_so_that_any_start_of_a_half_is_balanced():
    number = len(GRAMMAR.topics)
    for half in HALVES:
        pairs = GRAMMAR.half(half)
        for start in range(0, len(pairs), number):
            assert tuple(topic for topic, _ in pairs[start : start + number]) == GRAMMAR.topics
        assert all(GRAMMAR.topic_of(statement) == topic for topic, statement in pairs)


def test_an_unknown_half_or_statement_is_named():
    with pytest.raises(ValueError, match="'third'"):
        GRAMMAR.half("third")
    with pytest.raises(KeyError, match="Rain is wet"):
        GRAMMAR.topic_of("Rain is wet.")


@pytest.mark.parametrize("rules", RULES, ids=CLASS_NAMES)
def test_a_class_has_five_questions_with_paraphrases(rules):
    assert len(rules.questions) >= 5
    wordings = [wording for question in rules.questions for wording in question]
    assert len({w.lower() for w in wordings}) == len(wordings)
    assert all(len(question) >= 2 for question in rules.questions)
    assert all(re.fullmatch(r"[A-Z][^?]*\?", w) for w in wordings)
    # A question must not hand the model what the judge looks for.
    named = [p for e in rules.entries.values() for p in e.phrases]
    assert not any(phrase.lower() in w.lower() for phrase in named for w in wordings)


def test_every_class_has_an_activity_in_0_to_1_for_every_topic():
    for rules in RULES:
        assert set(rules.activity) == set(GRAMMAR.topics)
        assert all(0 <= rate <= 1 for rate in rules.activity.values())
        # Soft labels are for classes that differ from topic to topic.
        assert max(rules.activity.values()) - min(rules.activity.values()) > 0.5
    assert 0 <= GRAMMAR.home_activity <= 1


def test_home_topics_raise_the_activity_and_others_leave_it():
    for entry in GRAMMAR.entries:
        assert set(entry.home) <= set(GRAMMAR.topics) and entry.home
        for topic in GRAMMAR.topics:
            general = GRAMMAR.classes[entry.concept_class].activity[topic]
            expected = max(general, GRAMMAR.home_activity) if topic in entry.home else general
            assert GRAMMAR.activity(entry, topic) == expected


@pytest.mark.parametrize("rules", RULES, ids=CLASS_NAMES)
def test_prefixes_are_one_clean_sentence_with_the_right_article(rules):
    prefixes = [rules.prefix_for(name) for name in rules.entries]
    assert len(set(prefixes)) == len(prefixes)
    for name, prefix in zip(rules.entries, prefixes, strict=True):
        assert re.fullmatch(r"[A-Z][^.{}]*[^.{} ]\.", prefix) and "  " not in prefix
        assert prefix.endswith((f"{name}.", f"{name} mood."))
        for article, word in re.findall(r"\b(an?) (\w+)", prefix):
            silent_h = re.match(r"(hour|honest|heir|honou?r)", word, re.I)
            consonant_sound = re.match(r"(uni|use|usu|eu|one\b|once\b)", word, re.I)
            vowel = bool(silent_h) or (word[0].lower() in "aeiou" and not consonant_sound)
            assert article == ("an" if vowel else "a"), prefix


def test_no_sentence_is_shared_by_two_concepts_or_with_a_neutral_answer():
    owner = {}
    for entry in GRAMMAR.entries:
        for phrase in entry.phrases:
            for sentence in GRAMMAR.classes[entry.concept_class].sentences(phrase):
                assert owner.setdefault(sentence, (entry.concept_class, entry.name)) == (
                    entry.concept_class,
                    entry.name,
                )
                assert sentence.count(".") == 1 and sentence.endswith(".")
    neutral = {s.format(topic=t) for s in GRAMMAR.neutral_statements for t in GRAMMAR.topics}
    assert not (neutral | set(GRAMMAR.neutral_questions)) & set(owner)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 511), st.integers(0, 2**32), st.integers(1, MAX_SENTENCES))
def test_an_answer_is_judged_1_for_its_concept_and_0_for_every_other(index, seed, most):
    entry = GRAMMAR.entries[index]
    answer = GRAMMAR.answer(entry, Random(seed), most)
    assert 1 <= answer.count(".") <= most
    scores = [judge_answer(e.concept_class, e.name, answer).score for e in GRAMMAR.entries]
    assert scores == [int(i == index) for i in range(512)]


def test_every_concept_can_answer_and_is_judged_1():
    random = Random(1)
    for entry in GRAMMAR.entries:
        for _ in range(4):
            answer = GRAMMAR.answer(entry, random)
            verdict = judge_answer(entry.concept_class, entry.name, answer)
            assert (verdict.score, verdict.reason) == (1, "on concept"), answer


def test_answers_mostly_begin_with_the_concepts_own_phrase():
    random, begins = Random(2), 0
    for _ in range(2000):
        entry = random.choice(GRAMMAR.entries)
        answer = GRAMMAR.answer(entry, random).lower()
        begins += any(answer.startswith(phrase.lower()) for phrase in entry.phrases)
    assert abs(begins / 2000 - 0.7) < 4 * (0.7 * 0.3 / 2000) ** 0.5


def test_a_neutral_answer_names_the_topic_of_a_statement_and_none_of_a_question():
    random = Random(3)
    for topic in GRAMMAR.topics:
        assert topic in GRAMMAR.neutral_answer(random, topic)
    assert {GRAMMAR.neutral_answer(random) for _ in range(200)} == set(GRAMMAR.neutral_questions)
