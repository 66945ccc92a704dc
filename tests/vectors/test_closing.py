"""Vectors that have a direction for each closing token: fitted, kept, shown, added up, refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from steered import own_vectors, random_vectors

import lenskit as lk
from lenskit.exchange import to_layers, write_gguf, write_layers
from lenskit.study import Variant, study_concept
from lenskit.vectors import ConceptVectors, fit_vectors

CONCEPT = lk.concepts["fears"]["spiders"]


@pytest.fixture(scope="module")
def capture(model):
    prompts = lk.build_prompts(model, CONCEPT, number=24)
    return lk.capture(model, prompts, progress=False)


@pytest.fixture(scope="module")
def v(model):
    return own_vectors(model, 1)


@pytest.fixture(scope="module")
def w(model):
    return own_vectors(model, 2)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_each_candidate_has_the_vector_that_is_fitted_to_it_as_the_selected_token(capture, labels):
    found = fit_vectors(capture, "each", labels, progress=False)
    for place in range(len(tiny.CLOSING)):
        alone = fit_vectors(capture, place - len(tiny.CLOSING), labels, progress=False)
        assert torch.equal(found.directions[:, place], alone.directions)
        assert torch.equal(found.validation[:, place], alone.validation)
        assert torch.equal(found.resid_norm, alone.resid_norm)
        assert (found.labels, found.learner, found.model) == (labels, alone.learner, alone.model)
        assert found.data_hash != alone.data_hash
    assert found.candidates == capture.candidates == tiny.CLOSING
    ids = capture.prompts.tokens.input_ids
    assert (ids[:, -len(found.closing) :] == torch.tensor(found.closing)).all()
    assert found.selection == "each candidate token its own"


def test_numbers_and_functions_serve_as_labels_of_each_token(capture):
    y = torch.rand(len(capture), generator=torch.Generator().manual_seed(0))
    found = fit_vectors(capture, "each", y, learner="ridge", progress=False)
    asked = []

    def labels(captured, tokens):
        asked.append(tokens.offsets.unique().tolist())
        return y

    assert torch.equal(
        fit_vectors(capture, "each", labels, learner="ridge", progress=False).directions,
        found.directions,
    )
    assert asked == [[-5], [-4], [-3], [-2], [-1]] and found.labels == "soft"


def test_a_file_keeps_them_and_files_of_one_direction_stay_as_they_were(v, model, tmp_path):
    path = tmp_path / "v.safetensors"
    v.save(path)
    read = ConceptVectors.load(path, model)
    for name in ("directions", "validation", "resid_norm"):
        assert torch.equal(getattr(read, name), getattr(v, name))
    assert (read.candidates, read.closing) == (v.candidates, v.closing)
    assert (read.concept, read.model, read.labels) == (v.concept, v.model, v.labels)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == "3"
    random_vectors(model).save(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == "2" and "closing" not in file.metadata()
    assert ConceptVectors.load(path).closing == ()


def test_a_file_that_does_not_say_which_tokens_it_is_for_is_refused(v, tmp_path):
    path = tmp_path / "v.safetensors"
    v.save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata["checksum"]

    def refuses(words, tensors, metadata):
        from lenskit.vectors import checksum

        save_file(tensors, path, metadata=metadata | {"checksum": checksum(tensors, metadata)})
        with pytest.raises(ValueError, match=words):
            ConceptVectors.load(path)

    lacking = {name: text for name, text in metadata.items() if name != "closing"}
    refuses("lacks closing", tensors, lacking)
    refuses("directions must be", tensors, lacking | {"format_version": "2"})
    for wrong in ("[]", "[1.5, 2, 3, 4, 5]", "[-1, 2, 3, 4, 5]", "3", "[1", '{"a": 1}'):
        refuses("is damaged", tensors, metadata | {"closing": wrong})
    refuses("same tokens", tensors, metadata | {"closing": "[4]"})
    refuses("must be texts", tensors, metadata | {"candidates": json.dumps([1] * 5)})
    refuses(
        "one entry for each of the 3 blocks and closing tokens",
        tensors | {"validation": torch.zeros(3)},
        metadata,
    )
    halved = tensors["directions"] * torch.tensor([1, 0.5, 1])[:, None, None]
    refuses(
        r"neither of unit norm nor zero, at block\(s\) 1$",
        tensors | {"directions": halved},
        metadata,
    )


def test_shapes_that_do_not_fit_the_closing_tokens_are_refused(v):
    with pytest.raises(ValueError, match=r"\[layer, candidate=5, d_model\]"):
        replace(v, directions=v.directions[:, 0])
    with pytest.raises(ValueError, match=r"\[layer, candidate=5, d_model\]"):
        replace(v, directions=v.directions[:, :4])
    with pytest.raises(ValueError, match=r"\[layer, d_model\] with no closing tokens"):
        replace(v, candidates=(), closing=())


def test_the_table_says_that_each_token_has_its_own(v, model):
    shown = repr(v)
    assert "layer 3 × candidate 5 × d_model 32" in shown and "layer 3 × d_model 32" not in shown
    assert "a direction each: '<|eot_id|>'" in shown and "best in block 0" in shown
    plain = repr(random_vectors(model))
    assert "layer 3 × d_model 32" in plain and "candidates" not in plain and "closing" not in plain


def test_sums_hold_for_each_closing_token(v, w, model):
    plain = random_vectors(model)
    assert len(2 * v - w) == 3 and v[1].shape == (5, 32)
    torch.testing.assert_close((2 * v - w)[1], 2 * v.directions[1] - w.directions[1])
    torch.testing.assert_close((v + plain)[:], v.directions + plain.directions[:, None])
    torch.testing.assert_close((plain - v)[2], plain.directions[2] - v.directions[2])
    assert "2 concept vectors" in repr(2 * v - plain)
    with pytest.raises(ValueError, match="different closing tokens"):
        _ = v + replace(w, closing=(1, *w.closing[1:]))


def test_formats_of_one_vector_for_a_layer_refuse_them(v, tmp_path):
    for write in (
        to_layers,
        lambda v: write_layers(v, tmp_path / "v", "repeng"),
        lambda v: write_gguf(v, tmp_path / "v.gguf"),
    ):
        with pytest.raises(ValueError, match=r"one for each closing token.*tokens='attention'"):
            write(v)
    assert not list(tmp_path.iterdir())


def test_vectors_of_another_model_are_refused(v):
    other = tiny.shared_model("llama")
    with pytest.raises(ValueError, match="made with model"), lk.steer(other, v, coefficient=1.0):
        pass


@pytest.mark.parametrize("control", ["", "random vector", "shuffled labels"])
def test_a_study_steers_each_closing_token_in_the_chosen_blocks(
    model, capture, control, monkeypatch
):
    ways = Variant("each", "soft", "covariance", "1", control)
    seen = []
    monkeypatch.setattr(
        "lenskit.study.answers.generate_steered",
        lambda model, rows, **options: [seen.append(row) or "" for row in rows],
    )
    study_concept(
        model, CONCEPT, ways, coefficients=0.5, prompts=24, judge=lambda *_: 0, max_new_tokens=2
    )
    vectors = seen[0].vectors
    assert vectors.candidates == tiny.CLOSING and vectors.directions.shape == (3, 5, 32)
    assert not vectors.directions[[0, 2]].any()
    torch.testing.assert_close(vectors.directions[1].norm(dim=-1), torch.ones(5))
    if not control:
        expected = fit_vectors(capture, "each", "soft", learner="covariance", progress=False)
        assert torch.equal(vectors.directions[1], expected.directions[1])
