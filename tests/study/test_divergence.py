from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from steered import own_vectors, plain_hooks, random_vectors

from lenskit.generation import generate
from lenskit.models import chat_ids
from lenskit.study.calibration import calibrate
from lenskit.study.divergence import divergence, neutral_questions, unsteered

QUESTIONS = ("Why?", "What is the scariest thing in the world?", "Rain?")


@pytest.fixture(scope="module")
def base(model):
    return unsteered(model, QUESTIONS, max_new_tokens=5)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "answer"])
def test_the_divergence_is_that_of_hugging_faces_own_distributions(model, base, positions):
    reference, vectors = tiny.reference_model(tiny.shared_folder()), random_vectors(model)
    expected = []
    for question in QUESTIONS:
        prompt = chat_ids(model, [[{"role": "user", "content": question}]]).input_ids[0].tolist()
        answer = generate(model, question, max_new_tokens=5)
        ids = [*prompt, *answer.token_ids][: None if answer.finished else -1]
        places = torch.arange(len(ids))
        first = {"generated": len(prompt), "answer": len(prompt) - 1}.get(positions, 0)
        gate = places >= first if positions != "prompt" else places < len(prompt)
        added = {
            layer: 0.3 * vectors.resid_norm[layer] * row * gate[:, None]
            for layer, row in enumerate(vectors.directions)
        }
        with torch.no_grad():
            p = reference(torch.tensor([ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            with plain_hooks(reference, added):
                q = reference(torch.tensor([ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        expected.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none"))
    mean = sum(each.sum(-1).mean() for each in expected) / len(QUESTIONS)
    found = divergence(model, base, [vectors], [0.3], positions, relative=True, batch_size=2)
    torch.testing.assert_close(found[0], mean, atol=1e-4, rtol=1e-3)


def test_ways_are_measured_as_if_each_were_alone(model, base):
    ways = [random_vectors(model, 1), own_vectors(model), random_vectors(model, 2)]
    together = divergence(model, base, ways, [0.2, 0.5, 0.1], ["all", "all", "answer"])
    for i, (one, coefficient, where) in enumerate(
        zip(ways, [0.2, 0.5, 0.1], ["all", "all", "answer"], strict=True)
    ):
        alone = divergence(model, base, [one], [coefficient], where)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    assert float(divergence(model, base, ways[:1], [0.0])[0]) == pytest.approx(0.0, abs=1e-6)


def test_each_way_is_measured_under_its_own_operation(model, base):
    ways = [random_vectors(model, 1)] * 3
    names = ["add", "add_keeping_norm", "rotate"]
    together = divergence(model, base, ways, [0.4] * 3, operations=names)
    for i, name in enumerate(names):
        alone = divergence(model, base, ways[:1], [0.4], operations=name)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    assert len(set(together.tolist())) == 3
    with pytest.raises(ValueError, match="operations must be one, or 3"):
        divergence(model, base, ways, [0.4] * 3, operations=names[:2])


def test_calibrated_coefficients_move_the_model_by_the_target(model, base):
    ways = [random_vectors(model, 1), random_vectors(model, 2)]
    found = calibrate(model, ways, base, target=0.3, tolerance=0.02)
    for one, own in zip(ways, found, strict=True):
        reached = float(divergence(model, base, [one], [own.coefficient])[0])
        assert own.reached and reached == pytest.approx(own.divergence, rel=1e-3)
        assert abs(reached - 0.3) <= 0.02 * 0.3
    alone = calibrate(model, ways[0], base, target=0.3, tolerance=0.02)
    assert alone.coefficient == pytest.approx(found[0].coefficient)


def test_what_cannot_move_the_model_so_far_says_so(model, base):
    vectors = random_vectors(model)
    nothing = replace(vectors, directions=torch.zeros_like(vectors.directions))
    found = calibrate(model, nothing, base)
    assert not found.reached and math.isnan(found.divergence)
    assert not calibrate(model, vectors, base, most=1e-4).reached


def test_neutral_questions_are_no_part_of_the_prompts():
    asked = neutral_questions(4)
    assert len(set(asked)) == 4
    with pytest.raises(ValueError, match="number must be from 1"):
        neutral_questions(0)


def test_arguments_that_cannot_be_meant_are_named(model, base):
    vectors = random_vectors(model)
    with pytest.raises(ValueError, match="must be as many, got 1, 2 and 1"):
        divergence(model, base, [vectors], [0.1, 0.2])
    with pytest.raises(ValueError, match="target must be"):
        calibrate(model, vectors, base, target=0.0)
    with pytest.raises(ValueError, match="questions must be a list"):
        unsteered(model, "Why?")
