"""Causes named from planted faults: which edits help is given, so that each case is met."""

from __future__ import annotations

import emphasised
import pytest
import tiny
import torch

import lenskit as lk
from lenskit.study import edit_diagnosis

GOOD, BAD = lk.Heads({1: [0, 1]}), lk.Heads({0: [3]})


@pytest.fixture(scope="module")
def task():
    return emphasised.task("What falls?", "Why?", "Where to?")


@pytest.fixture
def helps(monkeypatch):
    """Which edits bring the target, by a function of span, heads and strength."""
    own: dict = {"when": lambda right, heads, strength: False}

    def answers(model, rows, **options):
        said = []
        for row in rows:
            edit = row.attention
            strength = 0.0
            if edit is not None:
                steps = torch.zeros(1, 1, 1)
                strength = 1.0 if edit.schedule is None else float(edit.schedule(steps))
                right = edit.span.text == emphasised.INSTRUCTION
            good = edit is not None and own["when"](right, edit.heads, strength)
            said.append(
                "Rain" if good else "tea and tea and tea and tea" if strength > 1 else "tea"
            )
        return said

    monkeypatch.setattr(edit_diagnosis, "generate_steered", answers)
    return own


def said(task, heads=GOOD, **options):
    model = tiny.shared_model()
    return lk.diagnose_edit(model, task, lk.Pasta(0.01), heads, **options)


def carried(right, heads, strength):
    """The good heads carry the span; twice as much as 1 spoils the answer."""
    return right and GOOD <= heads and 0.4 <= strength <= 1


def test_an_edit_that_helps_works(helps, task):
    helps["when"] = carried
    found = said(task)
    assert found.cause == "works" and found.coefficients == (0.5, 1.0)
    assert found.prompted == 0 and "works" in repr(found)
    table = found.table.set_index("coefficient")
    assert table.loc[1.0, "shown"] == 1 and table.loc[0.25, "unchanged"] == 1
    assert table.loc[2.0, "repeated"] == 1


def test_heads_that_carry_nothing_are_irrelevant_and_others_are_named(helps, task):
    helps["when"] = carried
    found = said(task, BAD)
    assert found.cause == "irrelevant heads" and GOOD <= found.heads
    assert "heads to try" in repr(found)
    named = said(task, BAD, others=[BAD, GOOD])
    assert named.cause == "irrelevant heads" and named.heads == GOOD


def test_a_bias_is_too_strong_or_too_weak(helps, task):
    helps["when"] = lambda right, heads, strength: right and GOOD <= heads and strength <= 0.3
    strong = said(task)
    assert strong.cause == "too strong" and strong.coefficients == (0.1, 0.25)
    helps["when"] = lambda right, heads, strength: right and GOOD <= heads and strength >= 2
    assert said(task).cause == "too little" and said(task).coefficients == (2.0, 4.0)


def test_a_span_elsewhere_is_wrong_where_the_tasks_own_helps(helps, task):
    helps["when"] = carried
    model = tiny.shared_model()
    elsewhere = [
        lk.span(model, prompt.messages, prompt.messages[0]["content"].split(". ")[1])
        for prompt in task.prompts
    ]
    found = said(task, spans=elsewhere)
    assert found.cause == "wrong span" and found.reference["the task's spans"] == 1
    assert said(task, spans=[lk.tasks.emphasised_span(model, p) for p in task.prompts]).cause == (
        "works"
    )


def test_where_nothing_helps_the_cause_is_unknown(helps, task):
    assert said(task).cause == "unknown" and said(task, BAD).coefficients is None


def test_what_cannot_be_meant_is_refused(task):
    with pytest.raises(ValueError, match="gains must be"):
        said(task, gains=())
    with pytest.raises(ValueError, match="has 3 prompts, got 1"):
        said(task, spans=[None])


def test_a_real_edit_is_tried_as_attend_would(task):
    model, some = tiny.shared_model(), [lk.Heads({0: [0]})]
    found = lk.diagnose_edit(model, task, lk.LogitBias(2.0), GOOD, others=some, gains=(1.0,))
    assert found.cause == "unknown" and found.table["shown"].tolist() == [0.0]
    answers = []
    for prompt in task.prompts:
        with lk.attend(
            model, lk.tasks.emphasised_span(model, prompt), lk.LogitBias(2.0), heads=GOOD
        ):
            answers += lk.generate(model, [prompt.messages], max_new_tokens=4)
    plain = lk.generate(model, [prompt.messages for prompt in task.prompts], max_new_tokens=4)
    same = sum(a == b for a, b in zip(answers, plain, strict=True)) / 3
    assert found.table["unchanged"].tolist() == [same]
