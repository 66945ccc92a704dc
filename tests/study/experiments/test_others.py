"""The further experiments, each on a tiny model: their ways, and what stands beside the scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from experimented import CONCEPTS, OPTIONS, ByTheText, answers_of, run
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from lenskit.attention import Knockout, Span, attend
from lenskit.capture import capture
from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.labels import aurocs, rank_correlations
from lenskit.models import chat_ids
from lenskit.prompts import build_prompts
from lenskit.recipes import DEFAULT
from lenskit.steering import steer
from lenskit.study.experiments import (
    classes,
    cost,
    failures,
    learners,
    open_prefix,
    proxy,
    where,
)
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.extraction import FromAnswers
from lenskit.study.experiments.optimised import expressing
from lenskit.study.experiments.proxies import next_log_probs, single_numbers
from lenskit.tasks import embedded
from lenskit.vectors import LEARNERS, fit_vectors

STATEMENTS = OPTIONS["statements"]
ONE = CONCEPTS[0]


@pytest.fixture(scope="module")
def bench(model):
    return Bench(model, ONE, 24, 0, LEARNERS, DEFAULT, STATEMENTS)


@pytest.fixture(scope="module")
def vectors(model):
    prompts = build_prompts(model, ONE, number=24, statements=STATEMENTS)
    return fit_vectors(capture(model, prompts, progress=False), progress=False)


def test_figures_of_many_sites_are_those_of_each():
    values = torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    rate = torch.arange(20) % 5 / 4.0
    scores, ranks = aurocs(values, rate > 0.5), rank_correlations(values, rate)
    for i in range(3):
        for j in range(2):
            own = values[:, i, j].numpy()
            assert float(scores[i, j]) == pytest.approx(roc_auc_score((rate > 0.5).numpy(), own))
            expected = spearmanr(own, rate.numpy()).statistic
            assert float(ranks[i, j]) == pytest.approx(expected)
    assert aurocs(values, torch.ones(20, dtype=torch.bool)).isnan().all()
    assert rank_correlations(values, torch.ones(20)).isnan().all()


def test_the_prefix_is_knocked_out_for_all_that_comes_behind_it(model, bench):
    prompts = bench.paired.prompts
    own = prompts.has_prefix.nonzero()[:, 0]
    found = single_numbers(bench)
    cut = next_log_probs(model, prompts.rows(own), knocked_out=True)
    row = int(own[2])
    real = prompts.tokens.attention_mask[row].bool()
    ids = prompts.tokens.input_ids[row, real]
    places = prompts.prefix_mask[row, real].nonzero()[:, 0].tolist()
    span = Span(tuple(places), tuple(ids.tolist()))
    with torch.no_grad():
        plain = model(ids[None])[0, -1].log_softmax(-1)
        with attend(model, span, Knockout(), start=places[-1] + 1):
            expected = model(ids[None])[0, -1].log_softmax(-1)
    torch.testing.assert_close(cut[2], expected, atol=1e-4, rtol=1e-4)
    kl = (plain.exp() * (plain - expected)).sum()
    drop = found["divergence, prefix knocked out"][2]
    assert float(drop) == pytest.approx(float(kl), abs=1e-4)


def test_proxies_are_compared_with_what_the_answers_show():
    found = run(proxy)
    ways = set(found.table.way)
    assert {
        "Eq. 4, median",
        "one head, chosen elsewhere",
        "projection on vector, best by the truth",
        "divergence without prefix",
        "divergence, prefix knocked out",
    } <= ways
    own = found.table[found.table.concept_class == "all"].set_index(["way", "measure"])
    for name in ("one head", "projection on vector"):
        best = own.loc[(f"{name}, best by the truth", "AUROC"), "mean"]
        assert best >= own.loc[(f"{name}, median", "AUROC"), "mean"]
    sites = found.parts["sites"]
    assert {"head", "mean over heads", "selected token"} <= set(sites.proxy)
    number = 3 * 4 * len(tiny_candidates())
    assert len(sites[(sites.proxy == "head") & (sites.concept_class == "all")]) == number


def tiny_candidates():
    return build_prompts(tiny.shared_model(), ONE, number=2).candidates


def test_each_place_is_steered_alone_and_the_cost_is_measured_elsewhere(model, vectors):
    task = replace(embedded("count", 2), max_new_tokens=4)
    found = run(where, CONCEPTS[:1], tasks=[task])
    for way, positions in (("the prompt", "prompt"), ("generated tokens", "generated")):
        own = answers_of(found, way)
        rows = [SteeringRow(q, vectors, 2.0 / 3, positions=positions) for q in own.question]
        assert list(own.answer) == generate_steered(model, rows, relative=True, max_new_tokens=5)
    own = answers_of(found, "closing tokens")
    ids = tuple(
        build_prompts(model, ONE, number=2).tokens.input_ids[0, -len(tiny_candidates()) :].tolist()
    )
    copies = vectors.directions[:, None].expand(-1, len(ids), -1).clone()
    at_closing = replace(
        vectors,
        directions=copies,
        validation=torch.zeros(copies.shape[:2]),
        candidates=tiny_candidates(),
        closing=ids,
    )
    with steer(model, at_closing, coefficient=2.0 / 3):
        assert list(own.answer) == generate(model, list(own.question), max_new_tokens=5)
    assert "unrelated tasks" in found.measures
    assert set(found.parts["tasks"].way) >= {"all tokens", "unsteered"}


def test_learners_stand_beside_the_ceiling_and_their_grid(model):
    found = run(learners, CONCEPTS[:1], steps=2)
    ways = set(found.table.way)
    assert {*LEARNERS, "optimised vector, one block", "rfm, bandwidth 10, scaled"} <= ways
    assert "covariance, in 4 directions" in ways and {"seconds", "MiB"} <= {*found.measures}
    cosines = found.parts["cosines"].set_index("way")
    near = cosines.loc["covariance and mean difference, block 1", "mean"]
    assert 0.5 < float(near) <= 1.0


def test_failing_concepts_are_told_with_the_judges_reasons():
    found = run(classes)
    reasons = found.parts["reasons"]
    shares = reasons.groupby(["concept_class", "way", "coefficient"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1.0)
    table = found.parts["concepts"]
    assert len(table) == 2 and {"held out", "commonest failure", "agreement of differences"} <= set(
        table
    )
    assert "held-out correlation" in set(found.parts["predictors"].measured)


def test_cost_counts_passes_and_seconds():
    found = run(cost, CONCEPTS[:1], numbers=(8, 24))
    own = found.table[found.table.measure == "forward passes"].set_index("way")["mean"]
    assert own["covariance, 8 prompts"] == 8 and own["paper, 24 prompts"] == 24
    # Half of the prompts have the prefix, and are run with it and without it for the labels.
    assert own["lenskit, 24 prompts"] == 24 + 2 * 12
    assert "Looked at 1 concept: " in found.notes[-1]
    seconds = found.table[found.table.measure == "seconds"]["mean"]
    assert (seconds > 0).all()


def test_faults_are_steered_as_they_are_named_and_diagnosed(model, vectors):
    found = run(failures, CONCEPTS[:1])
    own = answers_of(found, "wrong sign", coefficient=-2.0)
    with steer(model, vectors, coefficient=-2.0 / 3):
        assert list(own.answer) == generate(model, list(own.question), max_new_tokens=5)
    much = found.answers[found.answers.way == "too much"]
    assert sorted(set(much[~much.calibrated].coefficient)) == [3.0, 12.0]
    causes = found.parts["causes"]
    assert causes.groupby("way")["share"].sum().to_numpy() == pytest.approx(1.0)
    assert "named rightly" in found.measures


def test_concepts_without_a_prefix_are_found_in_other_ways(model, bench):
    found = run(open_prefix, CONCEPTS[:1])
    made = set(found.answers[found.answers.question != ""].way)
    assert {"prefix", "the concept's name as prefix", "neutral prefix as negative"} <= made
    assert {"answers that show it", "few-shot examples", "dictionary, no labels"} <= made


def test_vectors_from_answers_are_the_difference_of_their_means(model, bench):
    judge = ByTheText()
    told = expressing(bench, judge)
    assert set(told.questions).isdisjoint(ONE.questions)
    found = FromAnswers(judge)(bench)
    reference = tiny.reference_model(tiny.shared_folder())
    means = []
    for answers in (told.shown, told.plain):
        rows = []
        for question, answer in zip(told.questions, answers, strict=True):
            prompt = chat_ids(model, [[{"role": "user", "content": question}]]).input_ids[0]
            said = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt.tolist(), *said]])
            with torch.no_grad():
                states = reference(ids, output_hidden_states=True).hidden_states[2]
            rows.append(states[0, -len(said) :].mean(0))
        means.append(torch.stack(rows).mean(0))
    difference = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    torch.testing.assert_close(found.directions[1], difference, atol=1e-3, rtol=1e-3)
