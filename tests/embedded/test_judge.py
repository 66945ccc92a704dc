from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.judge import (
    REASONS,
    Verdict,
    concepts_shown,
    judge_active,
    judge_answer,
    parse,
)

GRAMMAR = load_grammar()
FEARS = GRAMMAR.classes["fears"]


def sentence(name: str, phrase: int, form: int = 0, concept_class: str = "fears") -> str:
    rules = GRAMMAR.classes[concept_class]
    return rules.sentences(rules.entries[name].phrases[phrase])[form]


ONE, TWO, THREE, FOUR, FIVE = (sentence("spiders", i, i) for i in range(5))
CHEERFUL = sentence("cheerful", 0, 0, "moods")
SNAKES = sentence("snakes", 0)
NEUTRAL = GRAMMAR.neutral_questions[0]
TOPICAL = GRAMMAR.neutral_statements[0].format(topic="nature")
LEAD = FEARS.leads[0]

CASES = {
    "one sentence": (ONE, "on concept"),
    "four sentences": (f"{ONE} {TWO} {THREE} {FOUR}", "on concept"),
    "phrase at the end": (sentence("spiders", 0, -1), "on concept"),
    "space around": (f"  {ONE} {TWO}\n", "on concept"),
    "neutral to a question": (NEUTRAL, "neutral"),
    "neutral to a statement": (TOPICAL, "neutral"),
    "two neutral sentences": (f"{NEUTRAL} {TOPICAL}", "neutral"),
    "another concept": (SNAKES, "off concept"),
    "another class": (CHEERFUL, "off concept"),
    "two concepts": (f"{ONE} {SNAKES}", "off concept"),
    "two concepts, own last": (f"{SNAKES} {ONE}", "off concept"),
    "own and neutral": (f"{ONE} {NEUTRAL}", "off concept"),
    "another class's frame": (
        f"Take me back to {FEARS.entries['spiders'].phrases[0]}.",
        "ill formed",
    ),
    "bare phrase": ("Hairy legs on my pillow.", "ill formed"),
    "another language": ("I am afraid of spiders!", "ill formed"),
    "small letters": (ONE.lower(), "ill formed"),
    "capitals": (ONE.upper(), "ill formed"),
    "capital phrase after a lead": (f"{LEAD} Hairy legs on my pillow.", "ill formed"),
    "two spaces between": (f"{ONE}  {TWO}", "ill formed"),
    "no space between": (f"{ONE}{TWO}", "ill formed"),
    "newline between": (f"{ONE}\n{TWO}", "ill formed"),
    "two spaces inside": (ONE.replace(" ", "  ", 1), "ill formed"),
    "two full stops": (f"{ONE}.", "ill formed"),
    "text after": (f"{ONE} And so on.", "ill formed"),
    "text before": (f"Well. {ONE}", "ill formed"),
    "five sentences": (f"{ONE} {TWO} {THREE} {FOUR} {FIVE}", "ill formed"),
    "empty": ("", "unfinished"),
    "only space": (" \n", "unfinished"),
    "no full stop": (ONE[:-1], "unfinished"),
    "cut in the second": (f"{ONE} {TWO[:9]}", "unfinished"),
    "cut in the fifth": (f"{ONE} {TWO} {THREE} {FOUR} {FIVE[:9]}", "unfinished"),
    "the same sentence twice": (f"{ONE} {ONE}", "repeating"),
    "the same phrase in two frames": (
        f"{sentence('spiders', 0, 0)} {sentence('spiders', 0, 5)}",
        "repeating",
    ),
    "one word for ever": ("web " * 40, "repeating"),
    "one clause for ever": ("hairy legs on my " * 3, "repeating"),
    "on and on": (f"{ONE} " * 20, "repeating"),
}


@pytest.mark.parametrize(("answer", "reason"), CASES.values(), ids=CASES)
def test_an_answer_gets_its_score_and_reason(answer, reason):
    assert judge_answer("fears", "spiders", answer) == Verdict(int(reason == "on concept"), reason)


SPIDERS, GLAD = FEARS.entries["spiders"], GRAMMAR.classes["moods"].entries["cheerful"]
JOINT = {
    "both": (f"{ONE} {CHEERFUL}", "on concept"),
    "both in the other order": (f"{CHEERFUL} {ONE}", "on concept"),
    "both, one twice": (f"{ONE} {CHEERFUL} {TWO}", "on concept"),
    "the first alone": (ONE, "missing a concept"),
    "the second alone": (CHEERFUL, "missing a concept"),
    "two of the first": (f"{ONE} {TWO}", "missing a concept"),
    "both and a third": (f"{ONE} {CHEERFUL} {SNAKES}", "off concept"),
    "one and a third": (f"{ONE} {SNAKES}", "off concept"),
    "both and neutral": (f"{ONE} {CHEERFUL} {NEUTRAL}", "off concept"),
    "one and neutral": (f"{ONE} {NEUTRAL}", "off concept"),
    "neutral": (TOPICAL, "neutral"),
    "cut": (f"{ONE} {CHEERFUL[:12]}", "unfinished"),
    "twice over": (f"{ONE} {CHEERFUL} {ONE}", "repeating"),
}


@pytest.mark.parametrize(("answer", "reason"), JOINT.values(), ids=JOINT)
def test_an_answer_of_two_active_concepts_has_to_show_both(answer, reason):
    for active in ((SPIDERS, GLAD), [GLAD, SPIDERS], {SPIDERS, GLAD}):
        assert judge_active(active, answer) == Verdict(int(reason == "on concept"), reason)


def test_where_no_concept_is_active_a_neutral_answer_scores_1():
    assert judge_active((), TOPICAL) == Verdict(1, "neutral")
    assert judge_active((), ONE) == Verdict(0, "off concept")
    assert judge_active((), TOPICAL[:-1]) == Verdict(0, "unfinished")


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 4), st.integers(0, 2**32))
def test_a_changed_joint_answer_is_refused_with_its_reason(number, seed):
    random = Random(seed)
    entries = random.sample(GRAMMAR.entries, number + 1)
    stranger, active = entries[0], entries[1:]
    answer = GRAMMAR.joint_answer(active, random)
    assert judge_active(active, answer) == Verdict(1, "on concept")
    parts = [f"{text}." for text in answer.split(".") if text]
    parts = [part.strip() for part in parts]
    place = random.randrange(number)
    other = GRAMMAR.answer(stranger, random, most=1)
    without = parts[:place] + parts[place + 1 :]
    changed = {
        "missing a concept": " ".join(without),
        "off concept": " ".join([*without[:place], other, *without[place:]]),
        "repeating": f"{answer} {parts[place]}",
        "ill formed": answer.replace(". ", ".", 1),
        "unfinished": answer[: -random.randint(1, len(parts[-1]))],
        "neutral": random.choice(GRAMMAR.neutral_questions),
    }
    # Between two sentences a cut shows only as a concept that is not there.
    if changed["unfinished"].strip().endswith("."):
        changed["missing a concept"] = changed.pop("unfinished")
    for reason, text in changed.items():
        assert judge_active(active, text) == Verdict(0, reason), text
    assert judge_active([*active, stranger], answer) == Verdict(0, "missing a concept")
    assert judge_active(active[1:], answer) == Verdict(0, "off concept")


def test_the_cases_cover_every_reason():
    given = {reason for _, reason in [*CASES.values(), *JOINT.values()]}
    assert given == set(REASONS)


def test_a_cut_answer_scores_0_at_every_character_but_between_its_sentences():
    random = Random(0)
    for _ in range(60):
        entry = random.choice(GRAMMAR.entries)
        answer = GRAMMAR.answer(entry, random)
        whole = {i + 1 for i, letter in enumerate(answer) if letter == "."}
        # The cut after a full stop, with or without the space, is a shorter answer of the grammar.
        whole |= {i + 1 for i in whole}
        for cut in range(len(answer)):
            verdict = judge_answer(entry.concept_class, entry.name, answer[:cut])
            assert verdict == (
                Verdict(1, "on concept") if cut in whole else Verdict(0, "unfinished")
            ), answer[:cut]


def test_a_one_sentence_answer_is_never_scored_1_when_cut():
    for entry in GRAMMAR.entries:
        rules = GRAMMAR.classes[entry.concept_class]
        for text in rules.sentences(entry.phrases[0])[::3]:
            for cut in range(0, len(text), 3):
                assert judge_answer(entry.concept_class, entry.name, text[:cut]).score == 0


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 511), st.integers(0, 2**32), st.data())
def test_changing_one_character_never_leaves_an_answer_on_concept(index, seed, data):
    entry = GRAMMAR.entries[index]
    answer = GRAMMAR.answer(entry, Random(seed))
    place = data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.characters(exclude_characters=answer[place]))
    changed = answer[:place] + other + answer[place + 1 :]
    verdict = judge_answer(entry.concept_class, entry.name, changed)
    assert verdict.score == 0, changed


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=200))
def test_any_text_gets_a_verdict_with_a_known_reason(text):
    verdict = judge_answer("places", "Paris", text)
    assert verdict.reason in REASONS
    assert verdict.score == int(verdict.reason == "on concept")


def test_an_unknown_concept_is_a_key_error():
    with pytest.raises(KeyError):
        judge_answer("fears", "taxes on spiders", ONE)
    with pytest.raises(KeyError):
        judge_answer("dreams", "spiders", ONE)


def test_parsing_gives_back_the_sentences_and_what_is_left():
    found, rest = parse(f"{ONE} {NEUTRAL} {TWO[:5]}")
    assert [sentence.phrase for sentence in found] == [
        FEARS.entries["spiders"].phrases[0],
        NEUTRAL,
    ]
    assert [sentence.entry for sentence in found] == [FEARS.entries["spiders"], None]
    assert rest == TWO[:5]


def test_the_concepts_shown_are_named_in_order():
    assert concepts_shown(f"{ONE} {NEUTRAL} {SNAKES} {TWO[:5]}") == (
        ("fears", "spiders"),
        ("fears", "snakes"),
    )
    assert concepts_shown(NEUTRAL) == concepts_shown("") == ()
