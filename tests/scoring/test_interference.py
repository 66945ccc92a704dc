"""Edits alone, in pairs and together, judged by each one's own judge."""

from __future__ import annotations

from functools import partial
from math import isnan

import numpy as np
import pytest
import torch
from steered import hook_count, random_vectors

import lenskit as lk
from lenskit.models import applied_edits
from lenskit.scoring import mean_interval

QUESTIONS = ["Why?", "What is the scariest thing in the world?", "Rain?", "Who are you?"]
OPTIONS = {"max_new_tokens": 5}


def edits_of(model):
    """A vector for all questions, one for the residual stream of a block, and an emphasis."""
    spans = [lk.span(model, question, question) for question in QUESTIONS]
    steer = partial(lk.steer, model, relative=False)
    return {
        "one": partial(steer, random_vectors(model), coefficient=3.0),
        "other": partial(steer, random_vectors(model, 1), coefficient=2.0, operation="clamp"),
        "span": partial(lk.attend, model, spans, lk.InstABoost(30.0)),
    }


def judges_of(edits):
    """Judges of no meaning that tell answers apart: a share, a bool and a verdict."""
    return {
        "one": lambda question, answer: sum(answer.token_ids) % 11 / 10,
        "other": lambda question, answer: sum(answer.token_ids) % 2 == 0,
        "span": lambda question, answer: lk.Verdict(int(sum(answer.token_ids) % 3 == 0), "so"),
    }


def test_every_setting_is_answered_as_in_contexts_of_ones_own(model):
    edits = edits_of(model)
    before = hook_count(model)
    found = lk.interference(model, QUESTIONS, edits, judges_of(edits), **OPTIONS)
    assert hook_count(model) == before and not applied_edits(model)
    assert found.settings == (
        (),
        *(("one",), ("other",), ("span",)),
        *(("one", "other"), ("one", "span"), ("other", "span")),
        ("one", "other", "span"),
    )
    own = dict(zip(found.settings, found.answers, strict=True))
    assert list(own[()]) == lk.generate(model, QUESTIONS, **OPTIONS)
    with edits["one"]():
        assert list(own["one",]) == lk.generate(model, QUESTIONS, **OPTIONS)
        with edits["other"]():
            expected = lk.generate(model, QUESTIONS, **OPTIONS)
            assert list(own["one", "other"]) == expected
            with edits["span"]():
                expected = lk.generate(model, QUESTIONS, **OPTIONS)
                assert list(own["one", "other", "span"]) == expected
    assert len({answers for answers in own.values()}) == len(own)


def test_the_table_has_means_paired_differences_and_their_intervals(model):
    edits = edits_of(model)
    judges = judges_of(edits)
    found = lk.interference(model, QUESTIONS, edits, judges, **OPTIONS)
    own = dict(zip(found.settings, found.answers, strict=True))

    def scores(edit, *setting):
        given = [judges[edit](q, a) for q, a in zip(QUESTIONS, own[setting], strict=True)]
        return np.array([float(getattr(each, "score", each)) for each in given])

    table = found.table().set_index(["edit", "beside"])
    assert len(table) == 9
    for edit, beside, setting in (
        ("one", "other", ("one", "other")),
        ("other", "one", ("one", "other")),
        ("span", "one, other", ("one", "other", "span")),
    ):
        row = table.loc[(edit, beside)]
        alone, together = scores(edit, edit), scores(edit, *setting)
        others = scores(edit, *(name for name in setting if name != edit))
        assert row["alone"] == pytest.approx(alone.mean())
        assert row["others"] == pytest.approx(others.mean())
        assert row["without"] == pytest.approx(scores(edit).mean())
        assert row["difference"] == pytest.approx((together - alone).mean())
        assert (row["low"], row["high"]) == pytest.approx(mean_interval(together - alone))
        assert row["questions"] == len(QUESTIONS)


def test_it_prints_what_loses_most_first_in_a_few_lines():
    answers = ((lk.Answer("a", finished=True, token_ids=[1]),),) * 4
    scores = torch.zeros(4, 2, 1)
    scores[1, 0], scores[3] = 1.0, 0.5
    settings = ((), ("a",), ("b",), ("a", "b"))
    found = lk.Interference(("a", "b"), settings, scores, answers)
    head, first, second = repr(found).splitlines()
    assert head.startswith("Interference of 2 edits, 1 question")
    assert first.split() == ["a", "beside", "b", "1.00", "0.50", "-0.50", "[+nan,", "+nan]"]
    assert "+0.50" in second and "<table>" in found._repr_html_()
    assert isnan(found.table()["low"][0])
    names = tuple(f"edit {i}" * 20 for i in range(9))
    pairs = [(), *((name,) for name in names), *((a, b) for a in names for b in names if a < b)]
    many = lk.Interference(names, tuple(pairs), torch.zeros(len(pairs), 9, 2), ())
    assert len(repr(many).splitlines()) <= 15 and len(repr(many)) <= 1500


def test_what_cannot_be_compared_is_refused(model):
    edits = edits_of(model)
    judges = judges_of(edits)
    run = partial(lk.interference, model)
    for words, given in {
        "edits must be two or more": (QUESTIONS, {"one": edits["one"]}, judges),
        "judges must be for the edits": (QUESTIONS, edits, {"one": judges["one"]}),
        "questions must be a list": ("Why?", edits, judges),
        "questions must be a list of one": ([], edits, judges),
    }.items():
        with pytest.raises(ValueError, match=words):
            run(*given)
    with pytest.raises(TypeError, match=r"edits\['one'\] must be a function"):
        run(QUESTIONS, edits | {"one": edits["one"]()}, judges)
    with pytest.raises(ValueError, match="score must be from 0 to 1"):
        run(
            QUESTIONS[:1],
            {k: edits[k] for k in ("one", "other")},
            {"one": lambda q, a: 2.0, "other": judges["other"]},
            **OPTIONS,
        )
    assert not applied_edits(model)
