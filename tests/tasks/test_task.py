from __future__ import annotations

import pickle
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lenskit as lk
from lenskit.embedded.dialogue import user
from lenskit.embedded.tasks import TASKS

NUMBER = 8
PROMPT = lk.tasks.TaskPrompt((user("Say tea. Say no more."),), "Say tea.", "tea", "coffee")


def judge(prompt, answer):
    return lk.Verdict(int(answer == prompt.target), "said")


def task(*cases: str | None) -> lk.tasks.Task:
    """One prompt for each case; ``None`` is a case of its own."""
    prompts = [replace(PROMPT, metadata={} if case is None else {"case": case}) for case in cases]
    return lk.tasks.Task("own", prompts, judge)


@pytest.mark.parametrize("name", TASKS)
def test_every_embedded_task_scores_its_targets_1_and_nothing_0(name):
    own = lk.tasks.embedded(name, NUMBER)
    assert len(own) == NUMBER and own.prompts == lk.tasks.embedded(name, NUMBER).prompts
    assert own.score([prompt.target for prompt in own.prompts]) == 1.0
    assert own.reasons([""] * NUMBER) == {"empty": NUMBER}


def test_conditions_seed_and_split_reach_the_builder():
    far = lk.tasks.embedded("format", NUMBER, kind="xml", length=(100, 150))
    assert {prompt.metadata["kind"] for prompt in far.prompts} == {"xml"}
    assert all(85 <= prompt.metadata["length"] <= 150 for prompt in far.prompts)
    assert far.prompts != lk.tasks.embedded("format", NUMBER, 1, kind="xml").prompts
    memory = lk.tasks.embedded("passage", NUMBER, kind="conflicts", rank=1, distractors=2)
    assert all(prompt.metadata["rank"] == 1 and prompt.otherwise for prompt in memory.prompts)
    trained = lk.tasks.embedded("format", NUMBER, split="train", kind="xml")
    assert not {p.emphasised for p in trained.prompts} & {p.emphasised for p in far.prompts}


def test_where_one_attribute_is_asked_for_its_values_are_the_labels():
    asked = lk.tasks.embedded("passage", 4, attribute="town")
    for own in (asked, lk.tasks.embedded("occupation", 4)):
        assert {p.target for p in own.prompts} < {*own.labels} and len(own.labels) > 10
    assert not lk.tasks.embedded("passage", 4).labels
    assert not lk.tasks.embedded("format", 4).labels


def test_what_an_embedded_task_cannot_be_is_said():
    with pytest.raises(ValueError, match="no embedded task 'json'; there are format"):
        lk.tasks.embedded("json")
    with pytest.raises(ValueError, match="does not know these conditions.*distance"):
        lk.tasks.embedded("format", distance=3)
    with pytest.raises(ValueError, match="split must be one of"):
        lk.tasks.embedded("format", 1, split="test")
    with pytest.raises(ValueError, match="number must be 1 or more"):
        lk.tasks.embedded("format", 0)
    with pytest.raises(ValueError, match="does not know these conditions.*yaml"):
        lk.tasks.embedded("format", kind="yaml")
    with pytest.raises(ValueError, match="has no kind 'she'"):
        lk.tasks.embedded("pronouns", kind="she")
    with pytest.raises(ValueError, match="kind='other' must be one of"):
        lk.tasks.embedded("passage", kind="other")


def test_an_answer_that_was_cut_off_fails_though_its_text_is_right():
    own = lk.tasks.embedded("count", 1)
    answers = [
        lk.Answer(own.prompts[0].target, finished=finished, token_ids=[1])
        for finished in (True, False)
    ]
    assert [own.reasons([answer]) for answer in answers] == [{"correct": 1}, {"unfinished": 1}]


def test_prompts_of_one_case_count_together():
    own = task("a", "a", "a", None)
    scores = own.scores(["tea", "coffee", "coffee", "tea"])
    assert scores.tolist() == [1 / 3, 1.0]
    assert own.score(["tea", "coffee", "coffee", "tea"]) == pytest.approx(2 / 3)


def test_answers_must_be_as_many_as_prompts():
    for answers in (["tea"], "tea", ["tea"] * 3):
        with pytest.raises(ValueError, match="task 'own' has 2 prompts, got"):
            task(None, None).verdicts(answers)
    with pytest.raises(ValueError, match="no prompts"):
        lk.tasks.Task("own", (), judge)


def test_a_task_prints_as_a_short_table_and_travels_to_workers():
    own = lk.tasks.embedded("format", 3, kind="json")
    assert "Task 'format', 3 prompts" in repr(own) and len(repr(own)) < 1500
    assert own._repr_html_().startswith("<table>")
    assert "emphasised" in repr(own.prompts[0])
    assert pickle.loads(cloudpickle.dumps(own)).prompts == own.prompts


def test_an_occurrence_of_a_span_must_be_one_that_there_is():
    with pytest.raises(ValueError, match="of several, say which with nth"):
        replace(PROMPT, emphasised="Say")
    assert replace(PROMPT, emphasised="Say", nth=1).characters == (9, 12)
    assert PROMPT.characters == (0, 8)
    for nth in (2, -1):
        with pytest.raises(ValueError, match=f"nth={nth}.*occurs 2 times"):
            replace(PROMPT, emphasised="Say", nth=nth)


@given(st.lists(st.sampled_from("ab "), min_size=1, max_size=12), st.data())
def test_the_characters_of_a_span_are_those_of_its_occurrence(letters, data):
    text = "".join(letters)
    start = data.draw(st.integers(0, len(text) - 1))
    span = text[start : data.draw(st.integers(start + 1, len(text)))]
    for nth in range(text.count(span)):
        prompt = lk.tasks.TaskPrompt((user(text),), span, "x", nth=nth)
        first, last = prompt.characters
        assert text[first:last] == span and text.count(span, 0, first) == nth


def test_rows_are_compared_prompt_by_prompt_with_the_first_or_a_named_one():
    own = task(*[None] * 40)
    # Ten prompts more are right, and none less: the difference is surer than either score.
    plain = ["tea"] * 20 + ["coffee"] * 20
    better = ["tea"] * 30 + ["coffee"] * 10
    table = lk.tasks.compare(own, {"plain": plain, "better": better})
    assert table["name"].tolist() == ["plain", "better"]
    assert table["score"].tolist() == [0.5, 0.75] and table["n"].tolist() == [40, 40]
    assert table["difference"].tolist() == [0.0, 0.25]
    low, high = table.loc[1, ["difference_low", "difference_high"]]
    half = 1.96 * (0.25 * 0.75 / 40) ** 0.5
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.03)
    assert table.loc[0, ["difference_low", "difference_high"]].tolist() == [0.0, 0.0]
    turned = lk.tasks.compare(own, {"plain": plain, "better": better}, to="better")
    assert turned["difference"].tolist() == [-0.25, 0.0]
    assert table.equals(lk.tasks.compare(own, {"plain": plain, "better": better}))


def test_the_interval_is_over_cases_and_not_over_their_wordings():
    one = task(*["a"] * 50)
    table = lk.tasks.compare(one, {"all": ["tea"] * 25 + ["coffee"] * 25})
    assert table["n"].tolist() == [1] and np.isnan(table["low"][0]) and table["score"][0] == 0.5


def test_a_table_may_be_split_by_what_a_prompt_says():
    own = lk.tasks.embedded("format", 12, asked=True)
    right = [prompt.target for prompt in own.prompts]
    table = lk.tasks.compare(own, {"right": right}, by=lambda p: p.metadata["kind"])
    assert set(table["group"]) == {"json", "lines", "xml"} and table["n"].sum() == 12


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="to='steered' is not among the answers"):
        lk.tasks.compare(task(None), {"plain": ["tea"]}, to="steered")
    with pytest.raises(ValueError, match="answers is empty"):
        lk.tasks.compare(task(None), {})
    with pytest.raises(ValueError, match=r"answers\['plain'\]: the task has 1 prompts, got 2"):
        lk.tasks.compare(task(None), {"plain": ["tea"] * 2}, by=lambda p: 1)
