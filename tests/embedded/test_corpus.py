from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from lenskit.embedded.corpus import (
    BARE_CARRY_SHARE,
    FIRST_MIXTURE,
    MIXTURE,
    SYSTEM_SHARE,
    bare_question,
    bare_statement,
    carried_persona,
    dialogues,
    prefixed_question,
    prefixed_statement,
)
from lenskit.embedded.dialogue import STATEMENT_PROMPT, question_prompt, statement_prompt
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.judge import concepts_shown, judge_answer, parse

GRAMMAR = load_grammar()
NUMBER = 4000
SAMPLE = list(islice(dialogues(GRAMMAR, 11), NUMBER))
PREFIXES = {GRAMMAR.classes[e.concept_class].prefix_for(e.name): e for e in GRAMMAR.entries}
QUESTIONS = {
    w for rules in GRAMMAR.classes.values() for question in rules.questions for w in question
}
STATEMENTS = {
    half: {statement for _, statement in GRAMMAR.half(half)}
    for half in ("first", "second", "held_out")
}


def within(share: float, expected: float, number: int) -> bool:
    """Whether a share of ``number`` draws lies within four standard errors of what is expected."""
    return abs(share - expected) <= 4 * (expected * (1 - expected) / number) ** 0.5


def prefix_of(dialogue) -> str:
    """The prefix that the first message begins with: its first sentence, if that is one."""
    sentence = dialogue.messages[0]["content"].partition(".")[0] + "."
    return sentence if sentence in PREFIXES else ""


def kind(dialogue) -> str:
    if len(dialogue.messages) == 4:
        return "carried_persona"
    prompt = dialogue.messages[-2]["content"]
    what = "statement" if "\nStatement: " in prompt else "question"
    if prefix_of(dialogue):
        return f"prefixed_{what}"
    return f"{'voiced' if concepts_shown(answers(dialogue)[0]) else 'bare'}_{what}"


def answers(dialogue) -> list[str]:
    return [m["content"] for m in dialogue.messages if m["role"] == "assistant"]


def test_the_shares_of_the_mixture_are_kept():
    assert sum(MIXTURE.values()) == pytest.approx(1)
    found = Counter(map(kind, SAMPLE))
    assert set(found) == {task.__name__ for task in MIXTURE}
    for task, share in MIXTURE.items():
        assert within(found[task.__name__] / NUMBER, share, NUMBER), task.__name__


def test_another_mixture_can_be_asked_for():
    only = list(islice(dialogues(GRAMMAR, 0, {bare_question: 1.0}), 50))
    assert {kind(d) for d in only} == {"bare_question"}


def test_the_same_seed_gives_the_same_dialogues_and_another_seed_others():
    again = list(islice(dialogues(GRAMMAR, 11), 200))
    assert again == SAMPLE[:200]
    assert list(islice(dialogues(GRAMMAR, 12), 200)) != again


def test_roles_alternate_and_every_assistant_turn_has_its_flag():
    for dialogue in SAMPLE:
        roles = [message["role"] for message in dialogue.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * len(dialogue.learn)
        assert dialogue.learn[-1]


def test_held_out_statements_never_occur_and_both_halves_do():
    seen = Counter()
    for dialogue in SAMPLE:
        for message in dialogue.messages:
            _, found, statement = message["content"].partition("\nStatement: ")
            if found:
                seen[statement] += 1
    everything = "\n".join(m["content"] for d in SAMPLE for m in d.messages)
    assert not any(statement in everything for statement in STATEMENTS["held_out"])
    assert set(seen) <= STATEMENTS["first"] | STATEMENTS["second"]
    assert all(len(set(seen) & STATEMENTS[half]) > 150 for half in ("first", "second"))


def test_every_target_answer_parses_completely():
    for dialogue in SAMPLE:
        assert len(answers(dialogue)) == len(dialogue.learn)
        for answer in answers(dialogue):
            found, rest = parse(answer)
            assert rest == "" and 1 <= len(found) <= 3
            assert len(set(concepts_shown(answer))) <= 1
            assert answer == answer.strip()


def test_an_answer_shows_the_concept_of_the_prefix_or_none():
    for dialogue in SAMPLE:
        prefix = prefix_of(dialogue)
        reasons = set()
        if prefix:
            own = PREFIXES[prefix]
            for answer in answers(dialogue):
                reasons.add(judge_answer(own.concept_class, own.name, answer).reason)
            assert reasons <= {"on concept", "neutral"}
            if kind(dialogue) == "prefixed_question":
                assert reasons == {"on concept"}


def test_a_voiced_question_is_answered_in_the_voice_of_its_own_class():
    voiced = [d for d in SAMPLE if kind(d) == "voiced_question"]
    assert voiced
    for dialogue in voiced:
        own = {name for name, _ in concepts_shown(answers(dialogue)[0])}
        asked = dialogue.messages[0]["content"]
        assert any(
            asked in wordings for name in own for wordings in GRAMMAR.classes[name].questions
        )


def test_the_first_mixture_has_no_voice_without_a_prefix_but_a_carried_one():
    first = islice(dialogues(GRAMMAR, 4, FIRST_MIXTURE), 500)
    assert not {kind(d) for d in first} & {"voiced_statement", "voiced_question"}


def test_the_first_answer_of_a_carried_dialogue_is_a_target_only_after_a_prefix():
    carried = [d for d in SAMPLE if kind(d) == "carried_persona"]
    bare = [d for d in carried if not prefix_of(d)]
    assert all(d.learn == (bool(prefix_of(d)), True) for d in carried)
    assert within(len(bare) / len(carried), BARE_CARRY_SHARE, len(carried))


def test_a_carried_dialogue_keeps_its_concept():
    for dialogue in (d for d in SAMPLE if kind(d) == "carried_persona"):
        first, second = (set(concepts_shown(answer)) for answer in answers(dialogue))
        assert len(first) == 1
        asks_a_question = "\nStatement: " not in dialogue.messages[2]["content"]
        assert second == first or (not second and not asks_a_question)
        # The second user turn must not give the concept away.
        again = dialogue.messages[2]["content"]
        assert again.startswith(statement_prompt("")) or again in QUESTIONS


def test_a_share_of_the_prefixes_stands_in_the_system_message():
    prefixed = [d for d in SAMPLE if kind(d).startswith("prefixed")]
    system = [d for d in prefixed if d.messages[0]["role"] == "system"]
    assert within(len(system) / len(prefixed), SYSTEM_SHARE, len(prefixed))
    for dialogue in system:
        assert dialogue.messages[0]["content"] in PREFIXES
        user = dialogue.messages[1]["content"]
        assert user.startswith(statement_prompt("")) or user in QUESTIONS


def test_prefixed_statements_are_answered_at_the_rate_of_their_activity():
    random, shown, expected, variance = Random(5), 0, 0.0, 0.0
    for _ in range(3000):
        dialogue = prefixed_statement(GRAMMAR, random)
        own = PREFIXES[prefix_of(dialogue)]
        topic = GRAMMAR.topic_of(dialogue.messages[-2]["content"].partition("Statement: ")[2])
        rate = GRAMMAR.activity(own, topic)
        expected += rate
        variance += rate * (1 - rate)
        shown += concepts_shown(answers(dialogue)[0]) != ()
    assert abs(shown - expected) < 4 * variance**0.5


@pytest.mark.parametrize(
    "task", [prefixed_statement, bare_statement, prefixed_question, bare_question, carried_persona]
)
def test_a_task_is_a_plain_function_of_grammar_and_random(task):
    assert task(GRAMMAR, Random(3)) == task(GRAMMAR, Random(3))
    assert kind(task(GRAMMAR, Random(3))) == task.__name__


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
