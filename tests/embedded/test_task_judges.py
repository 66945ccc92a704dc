from __future__ import annotations

from functools import cache
from random import Random

import pytest

from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.tasks import SPLITS, TASKS, UNRELATED
from lenskit.embedded.tasks.formats import FORMATS, read, write
from lenskit.embedded.tasks.people import strangers

GRAMMAR = load_grammar()
PEOPLE = strangers(Random(0), "train", 2)

# The reason for the answer that does not follow the span.
IGNORED = {
    "format": "other format",
    "competing_formats": "other format",
    "pronouns": "pronoun left",
    "occupation": "occupation of another",
    "fact_document": "wrong content",
    "passage": "from memory",
    "register": "no register",
    "system_rule": "rule broken",
    "pronoun_bias": "other pronoun",
}
ADDED = {"fact_document": "wrong content", "pronoun_bias": "ill formed"}


@cache
def prompts(name: str, split: str = "held_out", **conditions) -> list:
    return TASKS[name].prompts(GRAMMAR, 60, split=split, **conditions)


def reason(prompt, answer: str, name: str) -> str:
    verdict = TASKS[name].judge(prompt, answer)
    assert verdict.score == (verdict.reason == "correct")
    return verdict.reason


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_target_passes_its_own_judge(name, split):
    assert {reason(p, p.target, name) for p in prompts(name, split)} == {"correct"}


@pytest.mark.parametrize("name", TASKS)
def test_empty_text_never_passes(name):
    assert {reason(p, text, name) for p in prompts(name) for text in ("", "  \n")} == {"empty"}


@pytest.mark.parametrize("name", TASKS)
def test_added_text_fails(name):
    found = {reason(p, f"{p.target} Well done.", name) for p in prompts(name)}
    # A line list goes on to the end of its line, and a plain sentence is no format of its own.
    if name in ("format", "competing_formats", "solved_examples", "marked_span"):
        assert found <= {"extra text", "wrong content"} and "extra text" in found
    else:
        assert found == {ADDED.get(name, "extra text")}


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_to_another_prompt_fails(name):
    for prompt in prompts(name):
        for other in prompts(name)[:10]:
            same = all(prompt.metadata.get(k) == other.metadata.get(k) for k in ("rank", "pronoun"))
            if other.target != prompt.target and not (same and name in ADDED):
                assert reason(prompt, other.target, name) != "correct"


@pytest.mark.parametrize("name", IGNORED)
def test_an_ignored_span_fails_with_its_own_reason(name):
    found = {reason(p, p.otherwise, name) for p in prompts(name) if p.otherwise}
    allowed = {IGNORED[name]} | ({"wrong content"} if name == "system_rule" else set())
    assert IGNORED[name] in found <= allowed | {"span ignored"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_read_back_and_no_other_format_reads_it(kind):
    text = write(kind, PEOPLE[0])
    fields = {"name": PEOPLE[0].name, "occupation": PEOPLE[0].facts["occupation"]}
    assert read(kind, text) == fields
    assert all(read(other, text) is None for other in (*FORMATS, "plain") if other != kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_fails_for_its_own_reason(kind):
    prompt = prompts("format", kind=kind)[0]
    fields = read(kind, prompt.target)
    cases = {
        prompt.target.replace(fields["name"], "Nobody Else"): "wrong content",
        prompt.target.replace(fields["occupation"], "king"): "wrong content",
        prompt.otherwise: "other format",
        write(FORMATS[FORMATS.index(kind) - 1], PEOPLE[0]): "other format",
        f"Here it is:\n{prompt.target}": "extra text",
        prompt.target.rpartition("ccupation")[0]: "ill formed",
        "I do not know": "ill formed",
    }
    for answer, why in cases.items():
        assert reason(prompt, answer, "format") == why, answer


def test_fields_that_are_missing_added_or_not_text_do_not_parse():
    for text in ('{"name": "A B"}', '{"occupation": "cook", "name": "A B"}', "[1]", "7", '"x"'):
        assert read("json", text) is None
    assert read("json", '{"name": "A B", "occupation": 3}') is None
    assert read("xml", "<person><name>A B</name></person>") is None
    assert read("xml", "<name>A B</name><occupation>cook</occupation>") is None
    assert read("lines", "name: A B\noccupation: cook\nage: 3") is None
    assert read("lines", "name: A B\n\noccupation: cook") is None


def test_pronouns_must_all_be_changed_and_the_content_kept():
    prompt = next(p for p in prompts("pronouns") if p.metadata["kind"] == "they")
    target = prompt.target
    cases = {
        target.replace("Their occupation", "Her occupation"): "pronoun left",
        target.replace("Their occupation", "They occupation"): "wrong pronoun",
        target.replace(prompt.metadata["occupation"], "king"): "wrong content",
        " ".join(target.split(". ")[1:]): "wrong content",
        target[:20]: "unfinished",
        "They they they.": "wrong content",
    }
    for answer, why in cases.items():
        assert reason(prompt, answer, "pronouns") == why, answer


def test_a_text_to_be_told_as_it_is_keeps_its_pronouns():
    prompt = next(p for p in prompts("pronouns") if p.metadata["kind"] == "plain")
    own = "Her" if " Her occupation" in prompt.target else "His"
    changed = prompt.target.replace(f"{own} occupation", "Their occupation")
    assert reason(prompt, changed, "pronouns") == "wrong pronoun"


def test_a_document_may_state_its_facts_in_any_order_but_each_and_no_sentence_twice():
    prompt = prompts("fact_document")[0]
    sentences = prompt.target.removesuffix(".").split(". ")

    def text(parts):
        return ". ".join(parts) + "."

    assert reason(prompt, text(sentences[:3][::-1]), "fact_document") == "correct"
    assert reason(prompt, text(sentences[:2]), "fact_document") == "unfinished"
    assert reason(prompt, text([*sentences, sentences[0]]), "fact_document") == "repeating"
    assert reason(prompt, text(sentences)[:-1], "fact_document") == "wrong content"


def test_the_other_register_is_told_from_none():
    for prompt in prompts("register"):
        if prompt.metadata["kind"] != "plain":
            assert reason(prompt, prompt.metadata["other"], "register") == "other register"
            assert reason(prompt, prompt.otherwise, "register") == "no register"


def test_a_bias_answer_needs_a_pronoun_and_one_of_the_endings():
    prompt = next(p for p in prompts("pronoun_bias") if p.metadata["kind"] == "open")
    assert reason(prompt, "He had a good day.", "pronoun_bias") == "other pronoun"
    assert reason(prompt, "She had a good day.", "pronoun_bias") == "correct"
    assert reason(prompt, "They had a good day.", "pronoun_bias") == "ill formed"
    assert reason(prompt, "She flew.", "pronoun_bias") == "ill formed"


@pytest.mark.parametrize("name", UNRELATED)
def test_an_exercise_has_one_right_answer(name):
    for prompt in prompts(name):
        assert reason(prompt, "river" if prompt.target != "river" else "0", name) != "correct"
        assert reason(prompt, prompt.target + "1", name) == "wrong content"
