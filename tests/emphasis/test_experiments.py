"""The experiments put together: which ways, which tables, kept parts. Answers are made up."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
import torch
from emphasised import small_model

import lenskit as lk
from lenskit.emphasis import choosing, comparison, tables
from lenskit.emphasis.choosing import SPARING, chosen
from lenskit.emphasis.comparison import FEW_SHOT, NOTHING, OWN, PASTA
from lenskit.emphasis.keeping import keeping
from lenskit.emphasis.oracle import Oracle
from lenskit.emphasis.tables import compared
from lenskit.emphasis.trials import trials
from lenskit.emphasis.ways import Way, answered, examples_span, with_examples

pytestmark = pytest.mark.usefixtures("nothing_left_on")

# Functions of these names stand before their modules.
field, sources = (import_module(f"lenskit.emphasis.{name}") for name in ("field", "sources"))
SIZES = lk.emphasis.Sizes(
    number=4, nearer=2, exercises=2, samples=2, steps=1, contrasts=4, ks=(2, 4), oracle=(2, 3, 1)
)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def made_up(monkeypatch, model):
    """Answers by the way alone; what is fitted for them is of no meaning. Counts what is asked."""
    scores = {NOTHING: 0.2, FEW_SHOT: 0.3, PASTA: 0.6, OWN: 0.9, "InstABoost": 0.5}
    calls: list[str] = []

    def made(model, way, tested, *, batch_size=256):
        calls.append(way.name)
        rows = []
        for trial in tested:
            spared = trial.role == "unrelated"
            for i in range(len(trial.task)):
                score = 1.0 if spared else scores.get(way.name.removesuffix(SPARING), 0.1)
                row = {"task": trial.name, "prompt": i, "answer": "She x", "score": score}
                row |= {"reason": "", "fluency": 1.0, "repeated": 0.0}
                rows.append(row | {"tokens": 2, "read": 9, "seconds": 0.1})
        return rows

    for module in (comparison, field, choosing, sources):
        monkeypatch.setattr(module, "answered", made)
    monkeypatch.setattr(tables, "DRAWS", 20)
    scored = [{"block": b, "head": h, "gain": 0.0} for b in range(3) for h in range(4)]
    order = [(row["block"], row["head"]) for row in scored]
    bias = lk.HeadBias(torch.zeros(3, 4), torch.zeros(3, 4))
    for module in (comparison, field):

        def profiled(model, tasks, keep, **options):
            keep.rows("profiled heads", make=lambda: scored)
            return order

        monkeypatch.setattr(module, "profiled", profiled)
    monkeypatch.setattr(choosing, "learn_head_bias", lambda *given, **options: bias)
    projections = choosing.projections_of(model, 4, 0)
    monkeypatch.setattr(comparison, "projections_of", lambda *given, **options: projections)
    monkeypatch.setattr(
        Oracle, "__call__", lambda self, *sizes: [{"block": 0, "head": 1, "p": 1.0}]
    )
    return calls


def test_all_ways_are_compared_on_all_tasks_and_a_second_call_asks_nothing(
    model, made_up, tmp_path
):
    found = lk.emphasis.compare(model, SIZES, out=tmp_path, progress=False)
    ways = set(found.table["way"])
    named = {"quotes", "asterisks", "repeated", "PASTA, all heads", "Spotlight, exact", "SEKA"}
    named |= {"PASTA with few-shot", "knock-out of the distractor", "oracle of heads (optimistic)"}
    named |= {"PASTA, random heads by block, 1", "PASTA, random heads", NOTHING, FEW_SHOT, PASTA}
    assert named <= ways
    wide = found.wide()
    assert wide.loc[PASTA, "profiled"] == pytest.approx(0.6)
    assert wide.loc[OWN, "not profiled"] == pytest.approx(0.9)
    reached = found.parts["targets"].set_index("target")["found"]
    assert reached[f"{PASTA}, over few-shot, profiled"] == pytest.approx(30)
    assert reached[f"learnt bias, over {PASTA}, not profiled"] == pytest.approx(30)
    assert found.parts["targets"]["met"].all()
    assert set(found.parts["by distance"]["tokens"]) == {"none", "1 to 40", "41 to 100", "over 100"}
    frequent = found.parts["by frequency"].groupby("frequency of the person")["frequency"].first()
    assert frequent.is_monotonic_decreasing
    number = len(made_up)
    again = lk.emphasis.compare(model, SIZES, out=tmp_path, progress=False)
    assert len(made_up) == number
    pd.testing.assert_frame_equal(found.table, again.table)
    written = found.save(tmp_path)
    assert "policies.csv" in {path.name for path in written}
    assert "4 prompts" not in repr(found) and "Experiment 'policies', 12 prompts" in repr(found)
    with pytest.raises(ValueError, match="other settings"):
        lk.emphasis.compare(model, lk.emphasis.Sizes(number=5), out=tmp_path, progress=False)


def test_a_way_that_spares_others_is_the_best_of_those_that_cost_them_next_to_nothing(
    model, monkeypatch, tmp_path
):
    scores = {"nothing": (0.0, 0.9), "gentle": (0.5, 0.885), "strong": (0.8, 0.7)}
    asked = []

    def made(model, way, tested, *, batch_size=256):
        asked.append(way.name)
        return [{"score": scores[way.name][tested[0].name == "copy"]}]

    monkeypatch.setattr(choosing, "answered", made)
    tasks, others = [lk.tasks.embedded("format", 1)], [lk.tasks.embedded("copy", 1)]
    with keeping("test", tmp_path, {}, progress=False) as keep:
        every = [Way("strong"), Way("gentle", lk.LogitBias(1.0))]
        found = chosen(model, {"a": every, "b": every[:1]}, tasks, keep, others=others)
        number = len(asked)
        chosen(model, {"a": every, "b": every[:1]}, tasks, keep, others=others)
    assert len(asked) == number
    rows = {name: way.name for name, way in found.items()}
    assert rows == {name: name for name in ("a" + SPARING, "b" + SPARING)}
    assert found["a" + SPARING].policy == lk.LogitBias(1.0)
    assert found["b" + SPARING].policy is None


def test_the_field_says_what_each_way_costs_and_what_it_does_elsewhere(model, made_up):
    other = small_model(1)
    found = lk.emphasis.field(model, SIZES, other=other, progress=False)
    costs = found.parts["costs"].set_index("way")
    weights = sum(each.numel() for each in model.original_model.parameters())
    assert costs.loc["full fine-tuning", "parameters"] == weights
    assert costs.loc["soft prompt", "parameters"] == 8 * 32
    assert costs.loc[OWN, "parameters"] == 24 and costs.loc[NOTHING, "parameters"] == 0
    assert list(costs.index[costs["persists"]]) == [
        *("LoRA", "full fine-tuning", "rank-one weight edit")
    ]
    assert costs.loc[NOTHING, "times as long a token"] == 1
    whole = found.parts["whole field"].set_index("way")
    assert whole.loc[OWN, "points, profiled"] == 70
    assert whole.loc[OWN, "points, profiled, on another checkpoint"] == 70
    assert "field" in found.markdown()


def test_sources_share_pairs_and_settings(model, made_up):
    found = lk.emphasis.sources(model, SIZES, kinds=("json", "formal"), progress=False)
    assert {*sources.SOURCES, NOTHING, sources.TOLD} == set(found.table["way"])
    tried = found.parts["settings chosen"]
    equal = tried[tried["source"] != sources.LEARNT].groupby(["kind", "source"]).size()
    assert equal.nunique() == 1 and len(equal) == 6
    bias = found.parts["planted bias"]
    assert set(bias["share planted"].dropna()) == {0.5, 0.75, 1.0}
    assert (bias["amplified"].dropna() == 0).all() and len(bias) == 10
    with pytest.raises(ValueError, match="kinds .* are not known"):
        lk.emphasis.sources(model, SIZES, kinds=("yaml",), progress=False)


def test_a_profile_is_shown_with_what_it_is_worth(model, monkeypatch):
    def short(*given, **conditions):
        return replace(lk.tasks.embedded(*given, **conditions), max_new_tokens=2)

    for name in ("heads", "trials"):
        module = import_module(f"lenskit.emphasis.{name}")
        monkeypatch.setattr(module, "PROFILED", dict.fromkeys(("copy", "count", "compare"), {}))
        monkeypatch.setattr(module, "embedded", short)
    sizes = lk.emphasis.Sizes(number=2, samples=2, ks=(1, 2), draws=1)
    found = lk.emphasis.heads(model, sizes, progress=False)
    assert set(found.parts) == {"scores", "reliability", "overlap", "cheaper stages"}
    assert len(found.parts["scores"]) == 3 * 12 and set(found.parts["cheaper stages"]["stage"]) == {
        *("blocks", "contribution")
    }
    curves = found.table[found.table["task"] == "copy"]
    assert (curves["heads"] == "none").sum() == 1
    assert set(curves["heads"]) == {"none", "given", "random", "random by block"}
    given = curves[curves["heads"] == "given"]
    assert set(given["k"]) == {1, 2} and set(given["alpha"]) == {
        0.0,
        0.001,
        0.01,
        0.1,
        0.5,
        2.0,
        5.0,
    }
    assert set(curves.loc[curves["heads"] == "random", "alpha"]) == {0.01, 0.1}
    assert found.wide().loc["none, k = 0, α = 1", "score"] == 0
    whole = found.table[found.table["task"] == "all"]
    for _, row in whole[whole["heads"] == "given"].iterrows():
        own = found.table[(found.table["way"] == row["way"]) & (found.table["task"] != "all")]
        assert row["mean"] == pytest.approx(own["mean"].mean())
        half = ((own["mean"] - own["low"]) ** 2).sum() ** 0.5 / 3
        assert row["mean"] - row["low"] == pytest.approx(half)


def test_edits_are_compared_with_themselves_alone_over_draws_of_concepts(model, tmp_path):
    sizes = lk.emphasis.Sizes(number=2)
    found = lk.emphasis.composition(model, sizes, out=tmp_path, progress=False)
    rows = found.table.set_index(["way", "measure"])
    assert found.measures == ["together", "alone", "without", "well formed"]
    # Each of three edits beside one of the two others, and beside both; in two compositions.
    assert len(rows) == 2 * 3 * 3 * 4 and (rows["n"] == 2).all()
    for way in found.table["way"].unique():
        gone = rows.loc[(way, "together"), "mean"] - rows.loc[(way, "alone"), "mean"]
        assert rows.loc[(way, "together"), "difference"] == pytest.approx(gone)
    bare = rows.loc[("first vector beside second vector", "without"), "mean"]
    assert bare == 0
    again = lk.emphasis.composition(model, sizes, out=tmp_path, progress=False)
    pd.testing.assert_frame_equal(found.table, again.table)


def test_an_answer_is_scored_on_the_prompt_it_was_asked_for(model):
    tested = trials(2, 0, 1, 0)
    rows = answered(model, Way("quotes", lk.LogitBias(3.0)), tested[:2])
    tasks = {trial.name: trial.task for trial in tested}
    for row in rows:
        task = tasks[row["task"]]
        assert row["score"] == task.judge(task.prompts[row["prompt"]], row["answer"]).score
    by_hand = tasks["format"].prompts[1]
    with lk.attend(model, lk.tasks.emphasised_span(model, by_hand), lk.LogitBias(3.0)):
        (said,) = lk.generate(model, [by_hand.messages], max_new_tokens=64)
    assert [row["answer"] for row in rows if row["prompt"] == 1][0] == said


def test_examples_are_emphasised_with_the_span_and_are_as_many_as_fit(model):
    (trial,) = [each for each in trials(2, 0, 0, 0) if each.name == "format"]
    prompt = trial.task.prompts[0]
    shown = with_examples(model, 2, 0, prompt, trial)
    found = examples_span(model, prompt, shown)
    own = lk.tasks.emphasised_span(model, shown)
    assert {*own.positions} <= {*found.positions}
    first = lk.span(model, shown.messages, shown.messages[0]["content"], nth=0)
    answer = lk.span(model, shown.messages, shown.messages[3]["content"], nth=0)
    asked = lk.span(model, shown.messages, prompt.messages[-1]["content"].split("\n")[-1], nth=-1)
    assert {*first.positions, *answer.positions} <= {*found.positions}
    assert not {*asked.positions} & {*found.positions}
    assert examples_span(model, prompt, prompt) == lk.tasks.emphasised_span(model, prompt)
    assert with_examples(model, 99, 0, prompt, trial) is prompt


def test_differences_are_over_the_same_prompts():
    rows = {
        "a": [{"task": "t", "prompt": i, "score": s} for i, s in enumerate([0.0, 1.0, 1.0])],
        "b": [{"task": "t", "prompt": i, "score": s} for i, s in enumerate([1.0, 1.0, 0.0])],
    }
    frame = pd.DataFrame([{"way": way, **row} for way, own in rows.items() for row in own])
    found = compared(frame, "score", "a").set_index("way")
    assert found.loc["b", "difference"] == 0 and found.loc["b", "mean"] == pytest.approx(2 / 3)
    assert found.loc["a", "difference_low"] == found.loc["a", "difference_high"] == 0
    assert found.loc["b", "difference_low"] < 0 < found.loc["b", "difference_high"]
