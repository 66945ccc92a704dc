from __future__ import annotations

import pickle
import re
from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.embedded import grammar as grammar_module
from lenskit.embedded.grammar import CLASS_NAMES, HALVES, MAX_SENTENCES, load_grammar
from lenskit.embedded.judge import concepts_shown, judge_answer

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


def test_a_concept_has_six_phrases_that_no_other_of_any_class_has():
    owners = Counter()
    for entry in GRAMMAR.entries:
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


@pytest.fixture
def altered(monkeypatch):
    """Loads the grammar with one file changed by a function of what it holds."""
    read = grammar_module._toml

    def load(name, change):
        def toml(*parts):
            found = read(*parts)
            if parts[-1] == name:
                change(found)
            return found

        monkeypatch.setattr(grammar_module, "_toml", toml)
        return load_grammar.__wrapped__()

    return load


@pytest.mark.parametrize(("owner", "file"), [("cheerful", "moods"), ("spiders", "fears")])
def test_a_phrase_given_to_two_concepts_is_refused_over_all_classes(altered, owner, file):
    taken = GRAMMAR.classes[file].entries[owner].phrases[2].upper()

    def change(found):
        found["gloomy"]["phrases"][0] = taken

    expected = rf"moods\.toml: .*{taken}.* of 'gloomy' already serves '{owner}' of {file}\.toml"
    with pytest.raises(ValueError, match=expected):
        altered("moods.toml", change)


@pytest.mark.parametrize("rate", [None, -0.1, 1.01, "often"])
def test_an_activity_that_is_no_rate_is_refused(altered, rate):
    def change(found):
        found["activity"]["art"]["moods"] = rate

    with pytest.raises(ValueError, match=r"classes\.toml: .*'moods' on 'art'.*rate from 0 to 1"):
        altered("classes.toml", change)


def test_a_topic_without_activities_is_refused(altered):
    with pytest.raises(ValueError, match=r"classes\.toml: .*'fears' on 'health' is None"):
        altered("classes.toml", lambda found: found["activity"].pop("health"))


def test_the_grammar_is_read_once_cannot_be_written_to_and_can_be_pickled():
    assert load_grammar() is GRAMMAR
    with pytest.raises(TypeError):
        GRAMMAR.classes["fears"].activity["food"] = 1.0
    with pytest.raises(TypeError):
        GRAMMAR.statements["food"]["first"] = ()
    again = pickle.loads(pickle.dumps(GRAMMAR))
    assert again == GRAMMAR and again.entries == GRAMMAR.entries
    with pytest.raises(TypeError):
        again.classes["fears"].activity["food"] = 1.0


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


CELLS = {(rules.name, t): rules.activity[t] for rules in RULES for t in GRAMMAR.topics}
GRADED = {cell for cell, rate in CELLS.items() if 0.2 <= rate <= 0.8}


def test_cells_are_nearly_0_or_1_but_for_one_in_six():
    assert len(CELLS) == 50 and len(GRADED) == 8
    assert {rate for cell, rate in CELLS.items() if cell not in GRADED} == {0.03, 0.97}
    # Degrees of every size, spread over classes and topics.
    assert len({CELLS[cell] for cell in GRADED}) == 8
    assert {name for name, _ in GRADED} == set(CLASS_NAMES)
    assert len({topic for _, topic in GRADED}) == 8
    assert 0.45 <= sum(CELLS[cell] for cell in GRADED) / 8 <= 0.55


@pytest.mark.parametrize("rules", RULES, ids=CLASS_NAMES)
def test_a_class_is_active_on_about_half_of_the_topics(rules):
    clear = [CELLS[rules.name, t] for t in GRAMMAR.topics if (rules.name, t) not in GRADED]
    assert min(sum(rate > 0.5 for rate in clear), sum(rate < 0.5 for rate in clear)) >= 4
    assert 0.4 <= sum(rules.activity.values()) / 10 <= 0.6


@pytest.mark.parametrize(("one", "other"), list(combinations(CLASS_NAMES, 2)))
def test_any_two_classes_have_topics_with_both_one_or_none_active(one, other):
    clear = [t for t in GRAMMAR.topics if not {(one, t), (other, t)} & GRADED]
    patterns = {(CELLS[one, t] > 0.5, CELLS[other, t] > 0.5) for t in clear}
    assert len(patterns) == 4


def test_every_topic_has_active_and_inactive_classes():
    for topic in GRAMMAR.topics:
        rates = [CELLS[name, topic] for name in CLASS_NAMES]
        assert 0.03 in rates and 0.97 in rates


def test_the_activity_of_a_concept_is_that_of_its_class():
    for entry in GRAMMAR.entries:
        assert GRAMMAR.prefix(entry) == GRAMMAR.classes[entry.concept_class].prefix_for(entry.name)
        for topic in GRAMMAR.topics:
            assert GRAMMAR.activity(entry, topic) == CELLS[entry.concept_class, topic]


def test_neutral_prefixes_are_many_clean_sentences_with_held_out_ones():
    drawn, held_out = GRAMMAR.neutral_prefixes, GRAMMAR.held_out_neutral_prefixes
    assert len(drawn) >= 12 and len(held_out) >= 4
    everything = [*drawn, *held_out]
    assert len({text.lower() for text in everything}) == len(everything)
    concepts = {GRAMMAR.prefix(entry) for entry in GRAMMAR.entries}
    for text in everything:
        assert re.fullmatch(r"[A-Z][a-zA-Z ]+\.", text) and "  " not in text
        assert text not in concepts


def test_a_joint_answer_is_one_sentence_of_each_in_their_order():
    random = Random(4)
    entries = random.sample(GRAMMAR.entries, 4)
    answer = GRAMMAR.joint_answer(entries, random)
    assert concepts_shown(answer) == tuple((e.concept_class, e.name) for e in entries)
    assert GRAMMAR.joint_answer(entries, random) != answer


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
