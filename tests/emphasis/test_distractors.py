"""What stands between a span and its question, for every task of the embedded corpus."""

from __future__ import annotations

import pytest
import tiny

import lenskit as lk
from lenskit.emphasis.contrastive import without_span
from lenskit.emphasis.planted import planted


def words(model, prompt):
    found = lk.emphasis.distractor_span(model, prompt)
    return None if found is None else found.text


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("format", {"asked": True, "length": (10, 40)}),
        ("pronouns", {"kind": "they", "length": (10, 40)}),
        ("occupation", {"length": (10, 40)}),
        ("passage", {"kind": "conflicts", "distractors": 2}),
        ("competing_formats", {"emphasise": "earlier"}),
        ("competing_formats", {"emphasise": "later"}),
    ],
)
def test_it_holds_neither_the_span_nor_the_question(task, given):
    model = tiny.shared_model()
    for prompt in lk.tasks.embedded(task, 4, **given).prompts:
        if task == "passage" and not prompt.metadata["distractors"]:
            continue
        own = lk.tasks.emphasised_span(model, prompt)
        found = lk.emphasis.distractor_span(model, prompt)
        assert not {*own.positions} & {*found.positions}
        question = prompt.messages[prompt.emphasised_in]["content"].split("\n")[-1]
        asked = lk.span(model, prompt.messages, question, nth=-1)
        assert not {*asked.positions} & {*found.positions}


def test_it_is_the_filler_the_other_request_or_the_plea():
    model = tiny.shared_model()
    (far,) = lk.tasks.embedded("format", 1, asked=True, length=(10, 40)).prompts
    assert words(model, far) == far.messages[0]["content"].split("\n")[1]
    (near,) = lk.tasks.embedded("format", 1, asked=True, length=(0, 0)).prompts
    assert words(model, near) is None
    (two,) = lk.tasks.embedded("competing_formats", 1, emphasise="earlier").prompts
    first = two.messages[0]["content"].split("\n")[0]
    assert f"{two.emphasised} {words(model, two)}" == first
    (rule,) = lk.tasks.embedded("system_rule", 1, kind="forbidden", plea=3).prompts
    assert rule.messages[-1]["content"].endswith(f"? {words(model, rule)}")
    assert words(model, lk.tasks.embedded("copy", 1).prompts[0]) is None


def test_a_prompt_without_its_span_is_the_rest_and_asks_the_same():
    (prompt,) = lk.tasks.embedded("register", 1, kind="formal", system=False).prompts
    bare = without_span(prompt)
    assert f"{prompt.emphasised}\n{bare.messages[0]['content']}" == prompt.messages[0]["content"]
    assert bare.target == prompt.target
    (inside,) = lk.tasks.embedded("passage", 1).prompts
    with pytest.raises(ValueError, match="is not the first line"):
        without_span(inside)


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_a_share_of_the_prompts_on_one_side_is_about_women(share):
    prompts = lk.tasks.embedded("format", 8, kind="json", length=(0, 0)).prompts
    pairs = planted([(each, without_span(each)) for each in prompts], share)
    she, he = {"she", "her", "hers"}, {"he", "him", "his"}

    def women(side):
        sentences = [pair[side].messages[0]["content"].split("\n")[0] for pair in pairs]
        told = [{word.strip(".").lower() for word in each.split()} for each in sentences]
        assert all(bool(each & she) != bool(each & he) for each in told)
        return sum(bool(each & she) for each in told) / len(told)

    assert (women(0), women(1)) == (share, 1 - share)
    for clean, corrupt in pairs:
        assert clean.emphasised in clean.messages[0]["content"]
        assert corrupt.messages[0]["content"].count("\n") == 2
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        planted([], 2.0)
