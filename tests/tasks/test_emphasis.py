from __future__ import annotations

import json

import pytest

import lenskit as lk
from lenskit.embedded.dialogue import user
from lenskit.embedded.tasks import TASKS

TASK = lk.tasks.embedded("format", 6, kind="json", length=(10, 40))
POOL = lk.tasks.embedded("format", 20, split="train", asked=True, length=(0, 0)).prompts


def own(text: str, span: str, nth: int | None = None, **fields) -> lk.tasks.TaskPrompt:
    return lk.tasks.TaskPrompt((user(text),), span, "tea", nth=nth, **fields)


def spoken(prompt) -> str:
    return prompt.messages[prompt.emphasised_in]["content"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mark", [*lk.tasks.MARKS, "**{text}**"])
def test_a_marked_span_is_found_and_all_else_stays(name, mark):
    for prompt in lk.tasks.embedded(name, 4).prompts:
        marked = lk.tasks.marked(prompt, mark)
        start, end = prompt.characters
        written = lk.tasks.MARKS.get(mark, mark).replace("{text}", prompt.emphasised)
        text = spoken(prompt)
        assert spoken(marked) == text[:start] + written + text[end:]
        first, last = marked.characters
        assert spoken(marked)[first:last] == marked.emphasised
        assert first - start == written.index(prompt.emphasised)
        assert (marked.target, marked.metadata) == (prompt.target, prompt.metadata)
        assert TASKS[name].judge(marked, marked.target).score == 1


def test_a_mark_goes_to_the_occurrence_that_is_meant():
    prompt = lk.tasks.marked(own("tea, tea and tea", "tea", 1), "stars")
    assert spoken(prompt) == "tea, *tea* and tea" and prompt.characters == (6, 9)
    repeated = lk.tasks.marked(own("tea, milk", "tea"), "repeated")
    assert spoken(repeated) == "tea tea, milk" and repeated.emphasised == "tea tea"
    # A mark may write the span's words once more than it marks them.
    other = lk.tasks.marked(own("Say on.", "on"), "on: {text}")
    assert spoken(other) == "Say on: on." and other.characters == (4, 10)


def test_a_mark_without_a_place_for_the_span_is_refused():
    with pytest.raises(ValueError, match="mark='bold' must be one of quotes, stars, repeated"):
        lk.tasks.marked(own("tea", "tea"), "bold")


def test_solved_examples_are_right_have_their_instruction_and_leave_the_prompt_as_it_is():
    for prompt in TASK.prompts:
        shown = lk.tasks.few_shot(prompt, POOL, 3)
        assert shown.messages[-1:] == prompt.messages and len(shown.messages) == 7
        assert spoken(shown)[slice(*shown.characters)] == prompt.emphasised
        for asked, answer in zip(shown.messages[:6:2], shown.messages[1:6:2], strict=True):
            assert "JSON" in asked["content"].split("\n")[0]
            assert json.loads(answer["content"])["name"] in asked["content"]
        assert TASK.judge(shown, prompt.target).score == 1


def test_examples_are_drawn_by_the_seed_without_the_prompt_itself():
    prompt = POOL[0]
    same = [p for p in POOL if p.metadata["kind"] == prompt.metadata["kind"]]
    shown = lk.tasks.few_shot(prompt, POOL, len(same) - 1)
    assert shown.messages.count(prompt.messages[0]) == 1
    first, again = (lk.tasks.few_shot(TASK.prompts[0], POOL, 2) for _ in range(2))
    assert first == again != lk.tasks.few_shot(TASK.prompts[0], POOL, 2, seed=1)
    with pytest.raises(ValueError, match=f"number={len(same)}: solved holds {len(same) - 1} other"):
        lk.tasks.few_shot(prompt, POOL, len(same))


def test_a_system_message_stays_first_and_an_examples_own_becomes_part_of_its_question():
    task = lk.tasks.embedded("system_rule", 4, kind="forbidden")
    pool = lk.tasks.embedded("system_rule", 4, split="train", kind="forbidden").prompts
    for prompt in task.prompts:
        shown = lk.tasks.few_shot(prompt, pool, 2)
        assert [m["role"] for m in shown.messages] == ["system"] + ["user", "assistant"] * 2 + [
            "user"
        ]
        assert shown.messages[0] == prompt.messages[0] and spoken(shown) == prompt.emphasised
        rules = {p.messages[0]["content"] for p in pool}
        assert shown.messages[1]["content"].split("\n")[0] in rules


def test_a_span_in_an_earlier_turn_moves_behind_the_examples():
    task = lk.tasks.embedded("passage", 4, kind="unseen", distractors=2, asked_before=1.0)
    pool = lk.tasks.embedded("passage", 9, split="train", kind="unseen", distractors=0).prompts
    for prompt in task.prompts:
        shown = lk.tasks.few_shot(prompt, pool, 2)
        assert spoken(shown) == spoken(prompt) and shown.emphasised_in == 4


def test_in_bare_text_examples_stand_before_the_prompt_and_the_spans_place_is_known():
    solved = [own(f"{name} cooks.\nSay it:", "Say it:") for name in ("Ann", "Bea", "Cat")]
    prompt = own("Dan cooks.\nSay it:", "Say it:")
    shown = lk.tasks.few_shot(prompt, solved, 2, separator="\n###\n")
    (message,) = shown.messages
    *examples, last = message["content"].split("\n###\n")
    assert last == prompt.messages[0]["content"] and len(examples) == 2
    assert all(example.endswith("Say it: tea") for example in examples)
    # The same instruction stands in every example: the third one is the prompt's.
    assert shown.nth == 2 and shown.characters[1] == len(message["content"])
    with pytest.raises(ValueError, match="separator is for prompts of one message"):
        lk.tasks.few_shot(lk.tasks.few_shot(prompt, solved, 1), solved, 1, separator="\n")
