"""Profiling equals steering one head after the other by hand, whatever stops it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

import lenskit as lk
from lenskit.models import load_model
from lenskit.profiling import cells
from lenskit.study import CellsFailed
from lenskit.tasks import Task, TaskPrompt

PASTA = lk.Pasta(alpha=0.01)
INSTRUCTION = "Answer in one word."


def judge(prompt, answer):
    return lk.Verdict(sum(map(ord, answer)) % 7 / 7, "by its letters")


def prompt(text, *, earlier=(), case=None):
    messages = (*earlier, {"role": "user", "content": text})
    return TaskPrompt(messages, INSTRUCTION, "Sun", metadata={} if case is None else {"case": case})


@pytest.fixture(scope="module")
def tasks():
    said = ({"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Rain."})
    first = (
        prompt(f"{INSTRUCTION} What is the scariest thing in the world?", case="a"),
        prompt(f"Rain? {INSTRUCTION}"),
        prompt(f"{INSTRUCTION} Why?", earlier=said, case="a"),
    )
    second = (prompt(f"Libraries should stay open on Sundays. {INSTRUCTION}"),)
    return [Task("one", first, judge, 3), Task("two", second, judge, 4)]


@pytest.fixture(scope="module")
def scores(model, tasks):
    return lk.profile_heads(model, tasks, PASTA, progress=False)


def by_hand(model, task, heads, policy=PASTA):
    """The mean score of each case, an answer at a time."""
    found = {}
    for number, each in enumerate(task.prompts):
        span = lk.tasks.emphasised_span(model, each)
        options = {"max_new_tokens": task.max_new_tokens}
        if heads is None:
            (answer,) = lk.generate(model, [each.messages], **options)
        else:
            with lk.attend(model, span, policy, heads=heads):
                (answer,) = lk.generate(model, [each.messages], **options)
        score = task.judge(each, answer).score
        found.setdefault(each.metadata.get("case", number), []).append(score)
    return [sum(each) / len(each) for each in found.values()]


def same(one, other):
    for name in ("samples", "baseline_samples"):
        assert torch.equal(getattr(one, name).nan_to_num(-1), getattr(other, name).nan_to_num(-1))
    assert (one.tasks, one.passes, one.model) == (other.tasks, other.passes, other.model)


def test_a_score_is_that_of_its_head_steered_alone_by_hand(model, tasks, scores):
    assert scores.samples.shape == (2, 2, 3, 4)
    for t, task in enumerate(tasks):
        cases = len(task.cases)
        assert scores.baseline_samples[t, :cases].tolist() == by_hand(model, task, None)
        for block, head in [(0, 0), (0, 3), (1, 2), (2, 1), (2, 3)]:
            hand = by_hand(model, task, lk.Heads([(block, head)]))
            assert scores.samples[t, :cases, block, head].tolist() == hand
    assert scores.samples[1, 1].isnan().all() and scores.baseline_samples[1, 1].isnan()
    assert len(scores.scores.unique()) > 4
    assert torch.equal(scores.scores[0], scores.samples[0].mean(dim=0))


def test_blocks_are_steered_together_and_each_head_has_the_score_of_its_block(model, tasks, scores):
    found = lk.profile_heads(model, tasks, PASTA, stage="blocks", progress=False)
    for block in (0, 2):
        hand = by_hand(model, tasks[0], lk.Heads({block: range(4)}))
        for head in range(4):
            assert found.samples[0, :, block, head].tolist() == hand
    assert found.passes < scores.passes


def test_only_the_heads_that_are_asked_for_are_steered(model, tasks, scores):
    asked = lk.Heads({0: [1, 3], 2: [0]})
    found = lk.profile_heads(model, tasks[0], PASTA, heads=asked, progress=False)
    assert found.heads == asked and len(found.table()) == 3
    for block, head in asked:
        assert torch.equal(found.samples[0, :, block, head], scores.samples[0, :, block, head])
    with pytest.raises(ValueError, match="not in this model"):
        lk.profile_heads(model, tasks, heads=lk.Heads({3: [0]}), progress=False)
    with pytest.raises(ValueError, match="heads is empty"):
        lk.profile_heads(model, tasks, heads=lk.Heads(), progress=False)


@pytest.mark.parametrize("stopped", [1, 6])
def test_a_profile_that_was_killed_goes_on_to_the_same_scores(
    model, tasks, scores, tmp_path, monkeypatch, stopped
):
    plain, calls = cells.generate_steered, []

    def until(*args, **options):
        calls.append(1)
        if len(calls) > stopped:
            raise KeyboardInterrupt
        return plain(*args, **options)

    again = partial(lk.profile_heads, model, tasks, PASTA, folder=tmp_path / "out", progress=False)
    monkeypatch.setattr(cells, "generate_steered", until)
    with pytest.raises(KeyboardInterrupt):
        again()
    (file,) = (tmp_path / "out").glob("cells-*.jsonl")
    # Besides, the last line is torn, as by a kill in the middle of writing it.
    file.write_bytes(file.read_bytes()[:-9])
    stopped, kept = 100, stopped - 1
    calls.clear()
    same(again(), scores)
    assert len(calls) == 2 * (1 + 3) - kept
    calls.clear()
    same(again(), scores)
    assert not calls


def test_a_folder_takes_further_tasks_and_refuses_other_settings(model, tasks, scores, tmp_path):
    options = {"folder": tmp_path / "out", "progress": False}
    lk.profile_heads(model, tasks[0], PASTA, **options)
    same(lk.profile_heads(model, tasks, PASTA, **options), scores)
    with pytest.raises(ValueError, match="other settings"):
        lk.profile_heads(model, tasks, PASTA, protect_bos=True, **options)
    other = lk.profile_heads(model, tasks, lk.Pasta(alpha=0.1), **options)
    assert not torch.equal(other.scores, scores.scores)
    judged = [replace(task, judge=lambda prompt, answer: lk.Verdict(1, "")) for task in tasks]
    assert lk.profile_heads(model, judged, PASTA, **options).scores.eq(1).all()


def test_samples_are_whole_cases_drawn_by_the_seed(model, tasks):
    many = replace(tasks[0], prompts=tasks[0].prompts * 3)
    assert many.cases[0] == [0, 2, 3, 5, 6, 8] and len(many.cases) == 4
    drawn = cells.sampled(many, 2, 1)
    assert drawn == cells.sampled(many, 2, 1) and len(drawn.cases) == 2
    assert {len(cells.sampled(many, 1, seed).prompts) for seed in range(20)} == {1, 6}
    assert cells.sampled(many, 9, 0) is many is cells.sampled(many, None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "at least one"),
        ({"stage": "layers"}, "stage must be one of heads, blocks"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"workers": 2}, "give a function that loads it"),
    ],
)
def test_what_cannot_be_meant_is_refused(model, tasks, change, message):
    with pytest.raises(ValueError, match=message):
        lk.profile_heads(model, **{"tasks": tasks[0], "progress": False, **change})
    with pytest.raises(ValueError, match="different names"):
        lk.profile_heads(model, [tasks[0], tasks[0]], progress=False)


def test_a_cell_that_fails_does_not_take_the_others_with_it(model, tasks, tmp_path):
    def judge(prompt, answer):
        if prompt.messages[0]["content"].startswith("Libraries"):
            raise OSError("no judge today")
        return lk.Verdict(1, "")

    broken = [replace(task, judge=judge) for task in tasks]
    with pytest.raises(CellsFailed, match="no judge today"):
        lk.profile_heads(model, broken, folder=tmp_path / "out", progress=False)


@pytest.mark.slow
def test_a_worker_gives_the_same_scores(tmp_path):
    folder = tiny.tiny_folder(tmp_path / "model")
    task = replace(lk.tasks.embedded("format", 2, kind="json", length=(0, 0)), max_new_tokens=4)
    load = partial(load_model, folder, device="cpu", check="hooks")
    options = {"heads": lk.Heads({0: [0], 1: [2, 3]}), "progress": False}
    here = lk.profile_heads(load(), task, **options)
    same(lk.profile_heads(load, task, workers=1, gpus=0, ray=False, **options), here)


def test_curves_hold_the_scores_of_their_sets_by_hand(model, tasks, tmp_path):
    sets = [lk.Heads({1: [0]}), lk.Heads({0: [3], 1: [0, 2]})]
    options = {"random": 2, "draws": 50, "progress": False, "folder": tmp_path / "out"}
    table = lk.profiling.curve(model, tasks[0], sets, (0.01, 1.0), **options)
    assert len(table) == 1 + 2 * 2 * (1 + 2 * 2)
    none = by_hand(model, tasks[0], None)
    assert table["score"][0] == pytest.approx(sum(none) / 2)
    alike = table[table["alpha"] == 1]
    assert (alike["difference"] == 0).all()
    given = table[table["heads"] == "given"].set_index(["k", "alpha"])
    for heads in sets:
        hand = by_hand(model, tasks[0], heads)
        assert given.loc[len(heads), 0.01]["score"] == pytest.approx(sum(hand) / 2)
    assert set(table["heads"]) == {"none", "given", "random", "random by block"}
    again = lk.profiling.curve(model, tasks[0], sets, (0.01, 1.0), **options)
    assert again.equals(table)
    del options["random"], options["draws"]
    shared = lk.profile_heads(model, tasks[0], PASTA, heads=sets[0], **options)
    assert shared.baselines[0] == pytest.approx(table["score"][0])
    assert shared.scores[0, 1, 0] == pytest.approx(given.loc[1, 0.01]["score"])
    with pytest.raises(ValueError, match="none of them empty"):
        lk.profiling.curve(model, tasks[0], [lk.Heads()])


def test_the_curve_at_0_keeps_the_pattern_of_queries_before_the_span(model, tasks):
    """All attention of later queries is on the span and on generated tokens."""
    late = tasks[1].prompts[0]
    span = lk.tasks.emphasised_span(model, late)
    seen = {}

    def read(value, hook):
        seen["pattern"] = value.clone()

    tokens = lk.chat_ids(model, [late.messages])
    with lk.attend(model, span, lk.Pasta(1e-30), heads=lk.Heads({1: [2]})), torch.no_grad():
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", read)]):
            model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    pattern, start = seen["pattern"][0, 2], span.positions[0]
    assert pattern[start:, list(span.positions)].sum(-1).allclose(torch.tensor(1.0))
    assert pattern[:start].sum(-1).allclose(torch.tensor(1.0))
