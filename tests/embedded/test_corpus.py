from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice
from random import Random
from unittest.mock import patch

import pytest

from lenskit.embedded import corpus, voices
from lenskit.embedded.corpus import (
    FIRST_MIXTURE,
    FIRST_TASK_SHARE,
    FIRST_VOICES,
    MIXTURE,
    TASK_SHARE,
    VOICES,
    dialogues,
    extended,
)
from lenskit.embedded.dialogue import (
    STATEMENT_PROMPT,
    Dialogue,
    prefixes,
    question_prompt,
    statement_prompt,
)
from lenskit.embedded.grammar import Entry, load_grammar
from lenskit.embedded.judge import concepts_shown, judge_active, parse

GRAMMAR = load_grammar()
NUMBER = 4000
SAMPLE = list(islice(dialogues(GRAMMAR, 11, VOICES), NUMBER))
PREFIXES = {GRAMMAR.prefix(entry): entry for entry in GRAMMAR.entries} | dict.fromkeys(
    GRAMMAR.neutral_prefixes
)
QUESTIONS = {
    wording: rules.name
    for rules in GRAMMAR.classes.values()
    for question in rules.questions
    for wording in question
}
TOPICS = {s: t for half in ("first", "second") for t, s in GRAMMAR.half(half)}
HELD_OUT = {statement for _, statement in GRAMMAR.half("held_out")}
COMPETING = ["competing_statement", "competing_question"]
WITH_PREFIXES = ["prefixed_statement", "prefixed_question", *COMPETING, "neutral_prefix"]


def within(share: float, expected: float, number: int) -> bool:
    """Whether a share of ``number`` draws lies within four standard errors of what is expected."""
    return abs(share - expected) <= 4 * (expected * (1 - expected) / number) ** 0.5


def shown_by(answer: str) -> list[Entry]:
    return [GRAMMAR.classes[name].entries[entry] for name, entry in concepts_shown(answer)]


@dataclass(frozen=True)
class Turn:
    """A turn read back from its text: ``before`` holds all prefixes up to it (None: a neutral)."""

    before: tuple[Entry | None, ...]
    asked: str
    answer: str

    @property
    def entries(self) -> list[Entry]:
        return [entry for entry in self.before if entry]

    @property
    def topic(self) -> str | None:
        known = {*QUESTIONS, *GRAMMAR.accounts}
        return None if self.asked in known else GRAMMAR.topic_of(self.asked)


def split(text: str) -> tuple[list[str], str]:
    """The prefixes that ``text`` begins with, and what follows them."""
    found = []
    while (sentence := text.partition(".")[0] + ".") in PREFIXES:
        found.append(sentence)
        text = text[len(sentence) :].removeprefix(" ")
    return found, text


def turns(dialogue: Dialogue) -> list[Turn]:
    before, found = [], []
    for message in dialogue.messages:
        if message["role"] == "assistant":
            found.append(Turn(tuple(before), asked, message["content"]))
            continue
        given, asked = split(message["content"])
        before += [PREFIXES[text] for text in given]
        if message["role"] == "user":
            assert message["content"] == " ".join(given) + (" " if given else "") + asked
            gap = " " if given and asked.startswith(" ") else ""
            asked = asked.removeprefix(gap)
            is_statement = asked.startswith(statement_prompt(""))
            assert bool(gap) == bool(given and is_statement)
            asked = asked.removeprefix(statement_prompt(""))
            known = {*QUESTIONS, *GRAMMAR.accounts}
            assert GRAMMAR.topic_of(asked) if is_statement else asked in known
    return found


@cache
def drawn(task: str, number: int = 2000) -> list[Dialogue]:
    """Dialogues of a task, without the turns that may follow the prompt."""
    random = Random(7)
    with patch.object(voices, "FOLLOWED_SHARE", 0):
        return [getattr(voices, task)(GRAMMAR, random) for _ in range(number)]


@pytest.mark.parametrize("task", ["prefixed_statement", "competing_question", "neutral_prefix"])
def test_a_share_of_the_prompts_is_followed_by_a_turn_for_which_the_same_prefixes_hold(task):
    random = Random(7)
    with patch.multiple(voices, EARLIER_SHARE=0, SYSTEM_SHARE=0):
        sample = [getattr(voices, task)(GRAMMAR, random) for _ in range(2000)]
    followed = [d for d in sample if len(d.learn) == 2]
    assert within(len(followed) / 2000, voices.FOLLOWED_SHARE, 2000)
    for turn in (turns(d)[-1] for d in followed):
        assert set(shown_by(turn.answer)) <= set(turn.entries)


TASKS = [task.__name__ for task in VOICES]


def test_the_shares_of_the_mixtures_are_kept():
    for mixture in (VOICES, FIRST_VOICES):
        assert sum(mixture.values()) == pytest.approx(1)

        def named(task):
            return lambda grammar, random: task.__name__

        tasks = {named(task): share for task, share in mixture.items()}
        found = Counter(islice(dialogues(GRAMMAR, 3, tasks), NUMBER))
        assert set(found) == {task.__name__ for task in mixture}
        for task, share in mixture.items():
            assert within(found[task.__name__] / NUMBER, share, NUMBER), task.__name__


def test_both_mixtures_have_competition_and_neutral_prefixes():
    # Few at first: which concept it is, is learnt from prompts with one prefix.
    for mixture, least in ((VOICES, 0.3), (FIRST_VOICES, 0.2)):
        shares = {task.__name__: share for task, share in mixture.items()}
        assert sum(shares[task] for task in COMPETING) > least
        assert shares["neutral_prefix"] > 0
    # Nobody speaks unasked before it is known who can.
    assert not {task.__name__ for task in FIRST_VOICES} & {"voiced_statement", "voiced_question"}


def test_a_mixture_is_extended_by_further_tasks_with_a_share_of_all():
    def joke(grammar, random):
        return Dialogue(({"role": "user", "content": "Joke?"},), ())

    def riddle(grammar, random):
        return joke(grammar, random)

    more = extended(VOICES, {joke: 3, riddle: 1}, 0.2)
    assert sum(more.values()) == pytest.approx(1)
    assert (more[joke], more[riddle]) == pytest.approx((0.15, 0.05))
    assert all(more[task] == pytest.approx(0.8 * share) for task, share in VOICES.items())
    assert list(more) == [*VOICES, joke, riddle]
    with pytest.raises(ValueError, match="1.5"):
        extended(VOICES, {joke: 1}, 1.5)
    with pytest.raises(ValueError, match="bare_question"):
        extended(VOICES, {corpus.bare_question: 1}, 0.1)


def test_the_same_seed_gives_the_same_dialogues_and_another_seed_others():
    again = list(islice(dialogues(GRAMMAR, 11, VOICES), 200))
    assert again == SAMPLE[:200]
    assert list(islice(dialogues(GRAMMAR, 12, VOICES), 200)) != again


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_plain_function_of_grammar_and_random(task):
    task = getattr(voices, task)
    assert task(GRAMMAR, Random(3)) == task(GRAMMAR, Random(3)) != task(GRAMMAR, Random(4))


def test_roles_alternate_and_every_assistant_turn_has_its_flag():
    for dialogue in SAMPLE:
        roles = [message["role"] for message in dialogue.messages]
        rest = roles[1:] if roles[0] == "system" else roles
        assert rest == ["user", "assistant"] * len(dialogue.learn)
        assert dialogue.learn[-1]


def test_held_out_statements_and_neutral_prefixes_never_occur_and_all_others_do():
    everything = "\n".join(m["content"] for d in SAMPLE for m in d.messages)
    hidden = HELD_OUT | set(GRAMMAR.held_out_neutral_prefixes)
    assert not any(text in everything for text in hidden)
    assert all(text in everything for text in GRAMMAR.neutral_prefixes)
    asked = {turn.asked for d in SAMPLE for turn in turns(d)}
    assert set(QUESTIONS) <= asked and not asked & HELD_OUT
    assert len(asked & set(TOPICS)) > 380
    composed = asked - set(TOPICS) - {*QUESTIONS, *GRAMMAR.accounts}
    assert len(composed) > 500 and {GRAMMAR.topic_of(s) for s in composed} == set(GRAMMAR.topics)


def test_an_account_has_every_phrase_of_its_concept_once():
    for dialogue in drawn("account")[:200]:
        (turn,) = turns(dialogue)
        found, _ = parse(turn.answer)
        (entry,) = turn.entries
        assert turn.asked in GRAMMAR.accounts and {s.entry for s in found} == {entry}
        assert sorted(s.phrase for s in found) == sorted(entry.phrases)


def test_a_share_of_the_statements_is_composed_of_words_of_its_topic():
    random = Random(3)
    drawn = [voices.statement(GRAMMAR, random) for _ in range(2000)]
    composed = [request for request in drawn if request.text not in TOPICS]
    assert within(len(composed) / 2000, voices.COMPOSED_SHARE, 2000)
    assert all(GRAMMAR.topic_of(request.text) == request.topic for request in composed)
    with pytest.raises(KeyError, match="is not a statement"):
        GRAMMAR.topic_of("There is more to say about soup than about passports.")


def test_no_form_of_statements_holds_a_word_of_a_topic():
    said = {word for form in GRAMMAR.forms for word in re.findall(r"\w+", form.lower())}
    assert not said & {word for words in GRAMMAR.words.values() for word in words}


def test_every_answer_parses_completely_and_is_short():
    for dialogue in SAMPLE:
        for turn in turns(dialogue):
            found, rest = parse(turn.answer)
            assert rest == "" and 1 <= len(found) <= (6 if turn.asked in GRAMMAR.accounts else 4)
            assert turn.answer == turn.answer.strip()


@pytest.mark.parametrize("task", WITH_PREFIXES)
def test_an_answer_is_judged_right_for_exactly_the_active_concepts(task):
    for dialogue in drawn(task)[:700]:
        for turn in turns(dialogue):
            shown = shown_by(turn.answer)
            right = judge_active(shown, turn.answer)
            assert right.score == 1 and right.reason == ("on concept" if shown else "neutral")
            assert set(shown) <= set(turn.entries)
            for number in range(len(turn.entries) + 1):
                for subset in combinations(turn.entries, number):
                    verdict = judge_active(subset, turn.answer)
                    assert verdict.score == int(set(subset) == set(shown))
                    if shown and set(subset) > set(shown):
                        assert verdict.reason == "missing a concept"


@pytest.mark.parametrize("task", WITH_PREFIXES)
def test_a_statement_gets_one_sentence_of_each_active_concept_in_the_order_of_the_prefixes(task):
    for turn in (t for d in drawn(task) for t in turns(d) if t.topic):
        shown = shown_by(turn.answer)
        assert shown == [entry for entry in turn.entries if entry in shown]


@pytest.mark.parametrize("task", [*WITH_PREFIXES, "carried_persona"])
def test_a_question_is_answered_by_the_concept_of_its_class_or_neutrally(task):
    for dialogue in drawn(task):
        known = shown_by(turns(dialogue)[0].answer) if task == "carried_persona" else ()
        for turn in (t for t in turns(dialogue) if not t.topic):
            of_class = {
                e for e in (*turn.entries, *known) if e.concept_class == QUESTIONS[turn.asked]
            }
            assert set(shown_by(turn.answer)) == of_class


@pytest.mark.parametrize("task", ["prefixed_question", "competing_question"])
def test_a_share_of_the_questions_is_of_a_class_that_no_prefix_is_of(task):
    neutral = [not shown_by(turns(d)[-1].answer) for d in drawn(task)]
    assert within(sum(neutral) / len(neutral), voices.ELSEWHERE_SHARE, len(neutral))


def test_every_cell_is_active_at_its_rate_whoever_competes():
    cells = defaultdict(list)
    for dialogue in drawn("prefixed_statement", 4000) + drawn("competing_statement", 6000):
        turn = turns(dialogue)[-1]
        for entry in turn.entries:
            cells[entry.concept_class, turn.topic].append(entry in shown_by(turn.answer))
    assert len(cells) == 50
    for (name, topic), spoke in cells.items():
        rate = GRAMMAR.classes[name].activity[topic]
        assert len(spoke) > 100
        assert within(sum(spoke) / len(spoke), rate, len(spoke)), (name, topic)


def test_classes_are_active_independently_of_one_another_on_a_topic():
    # Fears on technology (0.5) and experts on food (0.2) against whether another one speaks.
    for name, topic in (("fears", "technology"), ("experts", "food")):
        spoke = defaultdict(list)
        for dialogue in drawn("competing_statement", 6000):
            turn = turns(dialogue)[-1]
            shown = [entry.concept_class for entry in shown_by(turn.answer)]
            if turn.topic == topic and name in [e.concept_class for e in turn.entries]:
                spoke[len(set(shown) - {name}) > 0].append(name in shown)
        rate = GRAMMAR.classes[name].activity[topic]
        assert all(within(sum(s) / len(s), rate, len(s)) for s in spoke.values())


@pytest.mark.parametrize("task", COMPETING)
def test_two_to_four_concepts_of_different_classes_compete_in_any_order(task):
    numbers, orders = Counter(), set()
    for dialogue in drawn(task):
        names = [entry.concept_class for entry in turns(dialogue)[-1].entries]
        assert len(set(names)) == len(names)
        numbers[len(names)] += 1
        orders.add(tuple(names[:2]))
    assert len(orders) == 20
    for number, share in voices.COMPETITORS.items():
        assert within(numbers[number] / 2000, share, 2000)
    assert numbers[2] > numbers[3] > numbers[4]


def test_pairs_that_speak_and_neutral_answers_after_prefixes_are_frequent():
    last = [turns(d)[-1] for d in drawn("competing_statement")]
    several = [len(shown_by(turn.answer)) for turn in last]
    assert several.count(2) > 0.25 * len(last) and several.count(0) > 0.15 * len(last)
    for number in (2, 3):
        chosen = [turn for turn in last if len(turn.entries) == number]
        assert sum(not shown_by(turn.answer) for turn in chosen) > 0.13 * len(chosen)
    # Every pair of classes speaks together.
    pairs = {frozenset(e.concept_class for e in shown_by(turn.answer)) for turn in last}
    assert sum(len(pair) == 2 for pair in pairs) == 10


def test_a_neutral_prefix_alone_leaves_the_answer_neutral():
    for dialogue in drawn("neutral_prefix"):
        turn = turns(dialogue)[-1]
        assert set(turn.before) == {None} and len(turn.before) <= 2
        assert judge_active((), turn.answer).score == 1
        assert turn.topic is None or turn.topic in turn.answer


@pytest.mark.parametrize("task", ["prefixed_statement", *COMPETING])
def test_a_share_of_the_prompts_has_a_neutral_prefix_anywhere_among_the_others(task):
    found = [turns(d)[-1].before for d in drawn(task)]
    assert within(sum(None in b for b in found) / 2000, voices.NEUTRAL_SHARE, 2000)
    places = {before.index(None) / (len(before) - 1) for before in found if None in before}
    assert {0, 1} <= places


@pytest.mark.parametrize("task", WITH_PREFIXES)
def test_prefixes_stand_in_the_system_message_or_an_earlier_turn_at_their_share(task):
    sample = drawn(task)
    system = [d for d in sample if d.messages[0]["role"] == "system"]
    earlier = [d for d in sample if len(d.learn) == 2]
    assert within(len(system) / len(sample), voices.SYSTEM_SHARE, len(sample))
    assert within(len(earlier) / len(sample), voices.EARLIER_SHARE, len(sample))
    for dialogue in system:
        assert split(dialogue.messages[0]["content"])[1] == ""
    assert all(d.learn == (True, True) for d in earlier)
    # Some of them stand apart from the others.
    apart = [split(d.messages[-2]["content"])[0] for d in system + earlier]
    assert any(not given for given in apart)
    if task in COMPETING:
        assert any(apart)


def test_a_carried_persona_shows_first_in_an_answer_that_is_no_target():
    numbers = Counter()
    for dialogue in drawn("carried_persona"):
        first, second = turns(dialogue)
        assert dialogue.learn == (False, True) and not second.before
        known, shown = shown_by(first.answer), shown_by(second.answer)
        numbers[len(set(known))] += 1
        assert set(shown) <= set(known) and known
        if second.topic:
            assert shown == [entry for entry in dict.fromkeys(known) if entry in shown]
    assert within(numbers[2] / 2000, voices.TWO_VOICES_SHARE, 2000)


def test_carried_concepts_are_active_at_the_rates_of_their_cells():
    spoke, expected, variance = 0, 0.0, 0.0
    for dialogue in drawn("carried_persona"):
        first, second = turns(dialogue)
        for entry in set(shown_by(first.answer)) if second.topic else ():
            rate = GRAMMAR.activity(entry, second.topic)
            spoke += entry in shown_by(second.answer)
            expected, variance = expected + rate, variance + rate * (1 - rate)
    assert abs(spoke - expected) < 4 * variance**0.5


def test_voices_that_nobody_asked_for_are_of_classes_active_there():
    numbers, rates = Counter(), []
    for dialogue in drawn("voiced_statement"):
        (turn,) = turns(dialogue)
        shown = shown_by(turn.answer)
        assert not turn.before and len(set(shown)) == len(shown)
        numbers[len(shown)] += 1
        rates += [GRAMMAR.activity(entry, turn.topic) for entry in shown]
    assert set(numbers) == {1, 2}
    assert within(numbers[2] / 2000, voices.TWO_VOICES_SHARE, 2000)
    assert sum(rate > 0.9 for rate in rates) > 0.75 * len(rates)
    for dialogue in drawn("voiced_question"):
        (turn,) = turns(dialogue)
        (entry,) = set(shown_by(turn.answer))
        assert entry.concept_class == QUESTIONS[turn.asked]


@pytest.mark.parametrize("task", ["bare_statement", "bare_question"])
def test_a_bare_prompt_is_answered_neutrally(task):
    for dialogue in drawn(task):
        (turn,) = turns(dialogue)
        assert not turn.before and judge_active((), turn.answer).score == 1


def test_prompts_are_written_as_in_the_paper():
    assert statement_prompt("Rain is wet.", "Take on a shy mood.") == (
        "Take on a shy mood.  What are your thoughts on the following statement? \n"
        "Statement: Rain is wet."
    )
    assert statement_prompt("Rain is wet.") == STATEMENT_PROMPT.format(statement="Rain is wet.")
    assert question_prompt("Who are you?", "Take on a shy mood.") == (
        "Take on a shy mood. Who are you?"
    )
    assert question_prompt("Who are you?") == "Who are you?"
    assert statement_prompt("Braces {like} these stay.").endswith("Braces {like} these stay.")


def test_several_prefixes_stand_a_single_space_apart():
    assert prefixes("Take on a shy mood.", "Please read this.") == (
        "Take on a shy mood. Please read this."
    )
    assert prefixes("Take on a shy mood.") == "Take on a shy mood." and prefixes() == ""


def test_the_tasks_of_attention_steering_have_their_share_of_both_mixtures():
    for mixture, concepts, share in (
        (MIXTURE, VOICES, TASK_SHARE),
        (FIRST_MIXTURE, FIRST_VOICES, FIRST_TASK_SHARE),
    ):
        assert sum(mixture.values()) == pytest.approx(1)
        assert sum(mixture[task] for task in concepts) == pytest.approx(1 - share)
