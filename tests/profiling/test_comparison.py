"""Sets of heads, reliability, overlap and agreement, against brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

import lenskit as lk
from lenskit.profiling import agreement, overlap, random_like, reliability

BLOCKS, HEADS = 2, 3


def made(samples, tasks=None, **changes):
    samples = torch.as_tensor(samples, dtype=torch.float64)
    names = tasks or tuple(f"task {i}" for i in range(len(samples)))
    settings = {"stage": "heads", "policy": "p", "model": "m", "passes": 7} | changes
    return lk.HeadScores(names, samples, torch.zeros(samples.shape[:2]).double(), **settings)


def drawn(tasks=2, samples=6, seed=0):
    values = np.random.default_rng(seed).random((tasks, samples, BLOCKS, HEADS))
    return made(values)


def best(scores, task, k):
    means = scores.samples[task].mean(dim=0)
    flat = sorted((-float(means[b, h]), (b, h)) for b in range(BLOCKS) for h in range(HEADS))
    return {pair for _, pair in flat[:k]}


@pytest.mark.parametrize("k", [1, 3, 6])
def test_sets_of_heads_are_those_of_the_sorted_scores(k):
    scores = drawn(tasks=3)
    sets = [best(scores, task, k) for task in range(3)]
    assert [each.pairs for each in scores.top(k).values()] == sets
    assert scores.intersection(k).pairs == sets[0] & sets[1] & sets[2]
    assert scores.union(k).pairs == sets[0] | sets[1] | sets[2]
    left = scores.leave_one_out(k)
    assert left["task 0"].pairs == sets[1] & sets[2] and left["task 2"].pairs == sets[0] & sets[1]


def test_heads_that_cannot_be_told_apart_stand_in_another_order_for_each_task():
    equal = made(np.ones((2, 3, 8, 8)))
    one, other = equal.top(16).values()
    assert one != other and equal.top(16) == equal.top(16)
    shared = [len(equal.intersection(16, seed=seed)) for seed in range(200)]
    assert np.mean(shared) == pytest.approx(16 * 16 / 64, abs=0.4)
    # Round-off tells none apart either.
    nudged = replace(equal, samples=equal.samples + 1e-15 * torch.arange(64.0).view(8, 8))
    assert nudged.top(16) == equal.top(16)


def test_heads_that_were_not_profiled_are_in_no_set():
    scores = drawn()
    samples = scores.samples.clone()
    samples[:, :, 1, 2] = torch.nan
    samples[1, 4:] = torch.nan
    some = made(samples)
    assert (1, 2) not in some.heads and len(some.heads) == 5 and len(some.table()) == 10
    assert some.table()["n"].tolist() == [6] * 5 + [4] * 5
    assert torch.equal(some.scores[1, 0], samples[1, :4, 0].mean(dim=0))
    with pytest.raises(ValueError, match="k must be"):
        some.top(6)
    with pytest.raises(ValueError, match="was not profiled"):
        some.ranking("other")
    with pytest.raises(ValueError, match="has no head"):
        made(samples * torch.nan)
    with pytest.raises(ValueError, match="one task"):
        made(samples[:1]).leave_one_out(2)


def spearman(one, other):
    return np.corrcoef(rankdata(one), rankdata(other))[0, 1]


def test_reliability_is_the_mean_rank_correlation_of_halves():
    scores = drawn(tasks=1, samples=4)
    values = scores.samples[0].flatten(1).numpy()
    found = reliability(scores, halves=3000).iloc[0]
    # The three ways to halve four samples are equally likely.
    exact = [
        spearman(values[[0, other]].mean(0), values[rest].mean(0))
        for other in (1, 2, 3)
        for rest in [[i for i in (1, 2, 3) if i != other]]
    ]
    assert found["correlation"] == pytest.approx(np.mean(exact), abs=0.03)
    assert found["low"] == pytest.approx(min(exact)) and found["high"] == pytest.approx(max(exact))
    mean = found["correlation"]
    assert found["full"] == pytest.approx(2 * mean / (1 + mean)) and found["n"] == 4
    assert reliability(scores, halves=5).equals(reliability(scores, halves=5))
    with pytest.raises(ValueError, match="needs two"):
        reliability(made(scores.samples[:, :1]))


def test_reliability_of_scores_that_rank_nothing_is_unknown():
    assert np.isnan(reliability(made(np.ones((1, 4, 2, 2))), halves=3)["correlation"][0])


@pytest.mark.parametrize("k", [2, 3])
def test_the_overlap_expected_by_chance_is_that_of_all_sets(k):
    scores = drawn(tasks=2)
    found = overlap(scores, [k], draws=20_000).iloc[0]
    sets = list(combinations(range(6), k))
    sizes = [len({*one} & {*other}) for one in sets for other in sets]
    assert found["expected"] == pytest.approx(np.mean(sizes))
    assert found["shared"] == len(best(scores, 0, k) & best(scores, 1, k))
    assert found["p"] == pytest.approx(np.mean([s >= found["shared"] for s in sizes]), abs=0.015)
    assert [found["low"], found["high"]] == np.quantile(sizes, [0.025, 0.975]).tolist()
    assert overlap(scores)["k"].tolist() == [1]
    with pytest.raises(ValueError, match="two tasks"):
        overlap(made(scores.samples[:1]))


def test_the_expected_overlap_of_four_tasks_is_pastas():
    scores = made(np.zeros((4, 1, 32, 32)))
    table = overlap(scores, [300, 400, 500, 750], draws=50)
    assert table["expected"].round(1).tolist() == [7.5, 23.8, 58.2, 294.7]


def test_agreement_compares_the_heads_and_tasks_that_both_have():
    one, other = drawn(tasks=2), drawn(tasks=2, seed=1)
    other = made(other.samples, ("task 1", "other"), passes=3)
    table = agreement(one, other, k=2)
    assert table["task"].tolist() == ["task 1"]
    means = [one.scores[1].flatten(), other.scores[0].flatten()]
    assert table["spearman"][0] == pytest.approx(spearman(*means))
    assert table["shared"][0] == len(best(one, 1, 2) & best(other, 0, 2)) / 2
    assert table["chance"][0] == pytest.approx(1 / 3)
    assert table[["passes", "other_passes"]].values.tolist() == [[7, 3]]
    perfect = agreement(one, one, k=3)
    assert perfect["spearman"].round(9).tolist() == [1, 1] and (perfect["shared"] == 1).all()
    with pytest.raises(ValueError, match="different models"):
        agreement(one, made(one.samples, model="other"))
    with pytest.raises(ValueError, match="in common"):
        agreement(one, made(one.samples, ("x", "y")))


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=15),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_sets_have_the_size_or_the_blocks_of_the_given_one(pairs, by_block, seed):
    heads = lk.Heads(pairs)
    among = lk.Heads({block: range(5) for block in range(4)})
    one, other = random_like(heads, among, number=2, by_block=by_block, seed=seed)
    assert [one, other] == random_like(heads, among, number=2, by_block=by_block, seed=seed)
    for each in (one, other):
        assert len(each) == len(heads) and each <= among
        if by_block:
            sizes = [{b: len(own) for b, own in s.by_block().items()} for s in (each, heads)]
            assert sizes[0] == sizes[1]


def test_random_sets_are_drawn_evenly_and_never_beyond_what_there_is():
    among = lk.Heads({0: range(4)})
    sets = random_like(lk.Heads({0: [0, 1]}), among, number=600)
    counts = [sum((0, head) in each for each in sets) for head in range(4)]
    assert all(240 < count < 360 for count in counts)
    with pytest.raises(ValueError, match="to draw 1 from"):
        random_like(lk.Heads({1: [0]}), among, by_block=True)


def test_scores_are_saved_and_read_and_damage_is_noticed(tmp_path):
    scores, path = drawn(), tmp_path / "heads.safetensors"
    scores.save(path)
    read = lk.HeadScores.load(path)
    assert torch.equal(read.samples, scores.samples) and read.samples.dtype == torch.float64
    assert (read.tasks, read.stage, read.policy) == (scores.tasks, "heads", "p")
    assert (read.model, read.passes) == ("m", 7)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        lk.HeadScores.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        lk.HeadScores.load(path)
    with pytest.raises(ValueError, match="must be"):
        made(scores.samples, ("one",))


def test_scores_print_as_a_short_table():
    text = repr(drawn())
    assert text.startswith("HeadScores of 6 heads on 2 tasks\n")
    assert "task 2 × sample 6 × block 2 × head 3" in text and len(text.splitlines()) < 15


def test_the_heat_map_is_white_at_each_tasks_baseline():
    scores = drawn(tasks=4)
    base = torch.full((4, 6), 0.5).double()
    figure = replace(scores, baseline_samples=base).figure(marked=list(scores.top(2).values()))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 4
    for task, axes in enumerate(panels):
        shown = axes.images[0]
        gains = (scores.samples[task].mean(dim=0) - 0.5).numpy()
        assert np.allclose(shown.get_array(), gains) and shown.norm.vmin == -shown.norm.vmax
        assert shown.cmap(shown.norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)
        dots = axes.lines[1]
        assert {*zip(dots.get_ydata(), dots.get_xdata(), strict=True)} == best(scores, task, 2)
    assert figure._repr_png_() and "block (2) and head (3)" in figure.alt
