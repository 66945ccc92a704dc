"""``fit_vectors`` on made captures, and the file that keeps the vectors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import BaseEstimator, clone
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

import lenskit.models
from lenskit.concepts import Concept
from lenskit.selector import TokenSelection
from lenskit.vectors import (
    ConceptVectors,
    Learner,
    Logistic,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
    Ridge,
    SoftCovariance,
    fit_vectors,
)

SPIDERS = Concept("Be afraid of spiders.", "spiders", "fears", ("What is scary?", "And why?"))
PROMPTS, LAYERS, CANDIDATES, WIDTH = 40, 3, 2, 24
ENDS = ("<end>", "<answer>")


@dataclass(frozen=True)
class MadeTokens:
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class MadePrompts:
    concept: Concept
    tokens: MadeTokens


@dataclass(frozen=True)
class MadeCapture:
    prompts: MadePrompts
    resid_post: Tensor
    model: str = "made:0123"
    candidates: tuple[str, ...] = ENDS
    layers: int = LAYERS


TOKENS = TokenSelection(torch.tensor([1, 0, 1]), ENDS, "by hand")


def made(seed: int = 0, hard: bool = False) -> tuple[MadeCapture, Tensor]:
    """A capture whose selected tokens depend on the labels, a different way in every block."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (PROMPTS, 9), generator=generator)
    mask = (torch.arange(9) >= torch.randint(3, (PROMPTS, 1), generator=generator)).long()
    y = torch.rand(PROMPTS, LAYERS, generator=generator)
    y = y * (torch.arange(PROMPTS) % 2 == 0)[:, None]
    y = (y > 0).float() if hard else y / y.amax(0)
    resid = torch.randn(PROMPTS, LAYERS, CANDIDATES, WIDTH, generator=generator)
    planted = torch.randn(LAYERS, WIDTH, generator=generator)
    for layer in range(LAYERS):
        resid[:, layer, TOKENS.index[layer]] += 2 * y[:, layer, None] * planted[layer]
    return MadeCapture(MadePrompts(SPIDERS, MadeTokens(ids, mask)), 3 * resid), y


def rows_of(capture: MadeCapture, layer: int) -> np.ndarray:
    rows = capture.resid_post[:, layer, TOKENS.index[layer]].numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fit(capture: MadeCapture, labels: Tensor, learner: object = None, **how) -> ConceptVectors:
    learner = MeanDifference() if learner is None else learner
    return fit_vectors(capture, TOKENS, labels, learner=learner, progress=False, **how)


@pytest.mark.parametrize(
    "learner",
    [
        MeanDifference(),
        SoftCovariance(),
        PrincipalComponent(random_state=3),
        Ridge(),
        Logistic(),
        RecursiveFeatureMachine(),
    ],
    ids=lambda learner: type(learner).__name__,
)
def test_each_block_gets_the_vector_that_the_learner_finds_in_its_normalised_rows(
    learner: Learner,
):
    capture, y = made()
    found = fit(capture, y, learner)
    assert found.directions.shape == (LAYERS, WIDTH) and found.directions.dtype == torch.float32
    torch.testing.assert_close(found.directions.norm(dim=1), torch.ones(LAYERS))
    for layer in range(LAYERS):
        X, labels = rows_of(capture, layer), y[:, layer].numpy()
        learner.fit(X[:32], labels[:32], X[32:], labels[32:])
        np.testing.assert_allclose(found.directions[layer], learner.direction_, atol=1e-5)
        assert float(found.validation[layer]) == pytest.approx(learner.validation_, abs=1e-5)


def test_the_default_is_the_covariance_which_for_hard_labels_is_the_mean_difference():
    capture, y = made(hard=True)
    found = fit_vectors(capture, TOKENS, y, progress=False)
    assert found.learner == "SoftCovariance()"
    expected = fit(capture, y, MeanDifference()).directions
    torch.testing.assert_close(found.directions, expected)


def test_soft_labels_are_not_dropped_by_the_default():
    capture, y = made()
    found = fit_vectors(capture, TOKENS, y, progress=False).directions
    assert torch.equal(found, fit(capture, y, SoftCovariance()).directions)
    assert not torch.allclose(found, fit(capture, y, MeanDifference()).directions, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        ("rfm", RecursiveFeatureMachine()),
        ("ridge", Ridge()),
        ("mean difference", MeanDifference()),
        (Ridge, Ridge()),
    ],
)
def test_a_learner_may_be_given_by_its_name_or_its_class(name, learner):
    capture, y = made()
    found = fit_vectors(capture, TOKENS, y, learner=name, progress=False)
    assert torch.equal(found.directions, fit(capture, y, learner).directions)


def test_a_misspelt_learner_is_answered_with_the_one_that_was_meant():
    capture, y = made()
    with pytest.raises(ValueError, match="'rigde' is not one of rfm, .*did you mean 'ridge'"):
        fit(capture, y, "rigde")
    with pytest.raises(TypeError, match="learner must be one of rfm, .*got int"):
        fit(capture, y, 3)


class Twofold(BaseEstimator):
    def fit(self, X, y):
        self.coef_ = X[:2]
        return self


class Lean(BaseEstimator):
    """No validation rows in ``fit``, and a direction of its own."""

    def fit(self, X, y):
        self.direction_ = X.T @ (y - y.mean())
        return self


@pytest.mark.parametrize(
    "learner",
    [LogisticRegression(), LinearSVC(), LinearRegression(), Lasso(1e-3), PLSRegression(1), Lean()],
    ids=lambda learner: type(learner).__name__,
)
def test_an_estimator_of_scikit_learn_is_a_learner_by_its_coefficients(learner):
    capture, y = made(hard=True)
    found = fit(capture, y, learner)
    for layer in range(LAYERS):
        X, labels = rows_of(capture, layer), y[:, layer].numpy()
        expected = clone(learner)
        if "random_state" in expected.get_params():
            expected.set_params(random_state=0)
        expected.fit(X[:32], labels[:32])
        direction = getattr(expected, "coef_", None)
        direction = np.ravel(expected.direction_ if direction is None else direction)
        cosine = found.directions[layer].numpy() @ direction / np.linalg.norm(direction)
        assert abs(cosine) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        (KNeighborsRegressor(), "KNeighborsRegressor has neither direction_ nor coef_"),
        (make_pipeline(StandardScaler(), LinearRegression()), "Pipeline has neither"),
        (LogisticRegression(), "is a classifier, and the labels are soft"),
        (Twofold(), r"coef_ of Twofold has shape \(2, 24\)"),
    ],
    ids=["neighbours", "pipeline", "classifier", "two rows"],
)
def test_an_estimator_without_one_direction_is_refused_in_words(learner, said):
    capture, y = made()
    with pytest.raises(ValueError, match=said):
        fit(capture, y, learner)


@pytest.mark.parametrize("form", ["list", "numpy", "float64", "one for each prompt", "function"])
def test_labels_may_be_handed_in_in_any_form(form):
    capture, y = made(hard=True)
    given = {
        "list": y.tolist(),
        "numpy": y.numpy().astype(bool),
        "float64": y.double(),
        "one for each prompt": y[:, 0].int(),
        "function": lambda capture, tokens: y,
    }[form]
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert torch.equal(fit(capture, given).directions, fit(capture, y).directions)


def test_labels_of_another_shape_or_name_are_refused():
    capture, y = made()
    for wrong in (y[:-1], y[:, :2], "firm", [["a"]], [[0.0, 1.0], [1.0]]):
        with pytest.raises(ValueError, match="labels must be"):
            fit(capture, wrong)
    holes = y.clone()
    holes[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"labels are not all finite at block\(s\) 1"):
        fit(capture, holes)


def test_tokens_may_be_an_offset_or_a_function():
    capture, y = made()
    own = replace(TOKENS, index=torch.tensor([1, 1, 1]))
    expected = fit_vectors(capture, own, y, progress=False).directions
    for tokens in (-1, "-1", np.int64(-1), lambda capture: own):
        assert torch.equal(fit_vectors(capture, tokens, y, progress=False).directions, expected)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (-1.5, ValueError, "offset must be a whole number"),
        (-3, ValueError, "offset must be from -2 to -1"),
        ("last", ValueError, "'attention' or an offset"),
        (TokenSelection(torch.tensor([0, 0, 0]), ("a", "b"), ""), ValueError, "selects among"),
        (TokenSelection(torch.tensor([0, 0]), ENDS, ""), ValueError, "for 2 blocks"),
        ([1, 0, 1], TypeError, "must be a TokenSelection"),
    ],
)
def test_tokens_that_do_not_fit_the_capture_are_refused(given, error, said):
    capture, y = made()
    with pytest.raises(error, match=said):
        fit_vectors(capture, given, y, progress=False)


@pytest.mark.parametrize("validation", [0, 1, -0.2, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(validation):
    capture, y = made()
    with pytest.raises(ValueError, match="validation must be a share"):
        fit(capture, y, validation=validation)


def test_the_papers_recipe_scales_validation_rows_and_gives_other_learners_raw_rows():
    capture, y = made()
    found = fit_vectors(capture, TOKENS, y, recipe="paper", progress=False)
    assert found.learner == "RecursiveFeatureMachine(scale_validation=True)"
    machine = RecursiveFeatureMachine(scale_validation=True)
    assert torch.equal(found.directions, fit(capture, y, machine).directions)
    uneven = replace(
        capture, resid_post=capture.resid_post * (1 + torch.arange(40.0))[:, *[None] * 3]
    )
    raw = fit_vectors(uneven, TOKENS, y, learner="covariance", recipe="paper", progress=False)
    for layer in range(LAYERS):
        X = uneven.resid_post[:32, layer, TOKENS.index[layer]].double()
        expected = (X - X.mean(0)).T @ (y[:32, layer].double() - y[:32, layer].double().mean())
        cosine = torch.cosine_similarity(expected, raw.directions[layer].double(), dim=0)
        assert float(cosine.abs()) == pytest.approx(1, abs=1e-5)


def test_the_sign_of_each_block_is_by_its_own_labels():
    capture, y = made()
    opposed = torch.stack([y[:, 0], y[:, 1], 1 - y[:, 2]], dim=1)
    found = fit(capture, opposed, SoftCovariance())
    for layer in range(LAYERS):
        projections = rows_of(capture, layer) @ found.directions[layer].numpy()
        assert np.corrcoef(projections, opposed[:, layer])[0, 1] > 0
    before = fit(capture, y, SoftCovariance()).directions
    torch.testing.assert_close(found.directions[:2], before[:2])
    torch.testing.assert_close(found.directions[2], -before[2])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.001, 1000))
def test_the_norm_of_a_row_does_not_matter_but_is_the_unit_of_relative_coefficients(seed, scale):
    capture, y = made(seed % 100)
    factors = torch.full((PROMPTS, 1, 1, 1), 1.0)
    factors[seed % PROMPTS] = scale
    scaled = replace(capture, resid_post=capture.resid_post * factors)
    found, before = fit(scaled, y), fit(capture, y)
    torch.testing.assert_close(found.directions, before.directions, atol=1e-5, rtol=1e-4)
    norms = scaled.resid_post.norm(dim=-1)
    torch.testing.assert_close(found.resid_norm, norms.mean(dim=(0, 2)))


def test_the_validation_share_and_its_cap_are_respected():
    capture, y = made()
    seen = []

    def learn(X, y, X_val, y_val):
        seen.append((len(X), len(X_val), len(y), len(y_val)))
        return X[0]

    found = fit(capture, y, learn)
    fit(capture, y, learn, validation=0.5)
    fit(capture, y, learn, validation=0.5, max_validation=6)
    assert seen[::LAYERS] == [(32, 8, 32, 8), (20, 20, 20, 20), (34, 6, 34, 6)]
    assert found.learner == "learn"


def test_a_plain_function_is_a_learner():
    capture, y = made()
    found = fit(capture, y, lambda X, y, X_val, y_val: X.T @ (y - y.mean()))
    expected = fit(capture, y, SoftCovariance())
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-6, rtol=1e-5)


def test_any_object_with_fit_and_direction_is_a_learner():
    class FirstRow:
        def fit(self, X, y, X_val=None, y_val=None):
            self.direction_ = X[0]
            return self

    capture, y = made()
    found = fit(capture, y, FirstRow())
    expected = torch.tensor(np.stack([rows_of(capture, layer)[0] for layer in range(LAYERS)]))
    torch.testing.assert_close(found.directions.abs(), expected.abs())


def test_the_seed_reaches_learners_that_draw_and_have_none_of_their_own():
    capture, y = made(hard=True)
    drawn = [fit(capture, y, PrincipalComponent(), seed=seed).directions for seed in (0, 0, 5)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    own = [fit(capture, y, PrincipalComponent(random_state=2), seed=s).directions for s in (0, 5)]
    assert torch.equal(own[0], own[1])


def test_the_learner_passed_in_is_left_as_it_was():
    capture, y = made()
    learner = Ridge()
    fit(capture, y, learner)
    assert not hasattr(learner, "direction_")


@pytest.mark.parametrize("value, words", [(float("nan"), "not finite"), (float("inf"), "not fin")])
def test_activations_that_are_not_finite_are_refused_naming_the_block(value, words):
    capture, y = made()
    capture.resid_post[4:6, 1, TOKENS.index[1], 3] = value
    with pytest.raises(ValueError, match=f"block 1 is {words}.* 2 of 40 prompts"):
        fit(capture, y)


def test_activations_of_zero_are_refused_naming_the_block():
    capture, y = made()
    capture.resid_post[7, 2] = 0
    with pytest.raises(ValueError, match="block 2 is all zero in 1 of 40 prompts"):
        fit(capture, y)


def test_labels_that_cannot_be_learnt_are_refused_naming_the_blocks():
    capture, y = made()
    for rows, name in ((slice(32), "32 training"), (slice(32, None), "8 validation")):
        constant = y.clone()
        constant[rows, 1:] = 0.5
        with pytest.raises(ValueError, match=rf"{name} labels are all equal at block\(s\) 1, 2"):
            fit(capture, constant)
    y[3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not all finite at block\(s\) 0"):
        fit(capture, y)
    with pytest.raises(ValueError, match=r"labels must be \[prompt, layer\] = \[40, 3\]"):
        fit(capture, y[:, :2])


@pytest.mark.parametrize("learner", [SoftCovariance(), RecursiveFeatureMachine()])
def test_a_block_without_a_direction_is_named(learner: Learner):
    capture, y = made()
    capture.resid_post[:, 1] = 1.0
    with pytest.raises(ValueError, match="block 1"):
        fit(capture, y, learner)


def test_the_provenance_says_what_the_vectors_were_made_from():
    capture, y = made()
    found = fit(capture, y, Ridge(alphas=(0.1,)))
    assert (found.model, found.concept) == ("made:0123", SPIDERS)
    assert (found.selection, found.labels) == ("by hand", "soft")
    assert found.learner == "Ridge(alphas=(0.1,))"
    hard_capture, hard = made(hard=True)
    assert fit(hard_capture, hard).labels == "hard"


def test_the_data_hash_is_of_tokens_and_labels_and_not_of_padding():
    capture, y = made()
    tokens = capture.prompts.tokens
    found = fit(capture, y).data_hash
    assert len(found) == 64

    def rehashed(ids: Tensor, mask: Tensor, labels: Tensor = y) -> str:
        prompts = replace(capture.prompts, tokens=MadeTokens(ids, mask))
        return fit(replace(capture, prompts=prompts), labels).data_hash

    padding = torch.zeros(PROMPTS, 2, dtype=torch.long)
    wider = (
        torch.cat([padding, tokens.input_ids], 1),
        torch.cat([padding, tokens.attention_mask], 1),
    )
    assert rehashed(*wider) == found
    changed = tokens.input_ids.clone()
    changed[3, -1] += 1
    assert rehashed(changed, tokens.attention_mask) != found
    assert rehashed(tokens.input_ids, tokens.attention_mask, y * 0.5) != found


def test_vectors_that_were_saved_are_loaded_unchanged(tmp_path):
    found = fit(*made())
    found.save(tmp_path / "spiders.safetensors")
    loaded = ConceptVectors.load(tmp_path / "spiders.safetensors")
    for name in ("directions", "validation", "resid_norm"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    texts = ("model", "concept", "learner", "selection", "labels", "data_hash", "version")
    assert [getattr(loaded, name) for name in texts] == [getattr(found, name) for name in texts]


def test_the_provenance_can_be_read_without_this_library(tmp_path):
    fit(*made()).save(tmp_path / "spiders.safetensors")
    with safe_open(tmp_path / "spiders.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["model"] == "made:0123"
    assert json.loads(metadata["concept"])["prefix"] == SPIDERS.prefix


def test_vectors_of_another_model_are_refused(tmp_path, monkeypatch):
    found = fit(*made())
    found.save(tmp_path / "spiders.safetensors")
    model = object()
    monkeypatch.setattr(lenskit.models, "model_fingerprint", lambda model: "made:0123")
    ConceptVectors.load(tmp_path / "spiders.safetensors", model).check_model(model)
    # The same weights in a folder of another name are the same model.
    monkeypatch.setattr(lenskit.models, "model_fingerprint", lambda model: "moved:0123")
    found.check_model(model)
    monkeypatch.setattr(lenskit.models, "model_fingerprint", lambda model: "other:4567")
    for refused in (
        lambda: ConceptVectors.load(tmp_path / "spiders.safetensors", model),
        lambda: found.check_model(model),
    ):
        with pytest.raises(ValueError, match="made with model made:0123, but the model is other"):
            refused()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "vectors.safetensors"
    fit(*made()).save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()

    def refuses(words: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=words):
            ConceptVectors.load(path)

    refuses("holds no concept vectors", tensors, {})
    refuses("format version '9'", tensors, metadata | {"format_version": "9"})
    refuses("is damaged: it is not what its checksum", tensors, metadata | {"learner": "other"})
    refuses("is damaged: it is not what its checksum", tensors | {"more": torch.ones(1)}, metadata)
    del metadata["checksum"]
    refuses("is damaged: it is not what its checksum", tensors, metadata)
    # What is refused for its own sake is refused in files without a checksum too.
    metadata["format_version"] = "1"
    refuses("lacks validation", {n: t for n, t in tensors.items() if n != "validation"}, metadata)
    refuses("lacks model", tensors, {n: t for n, t in metadata.items() if n != "model"})
    refuses("is damaged: resid_norm", tensors | {"resid_norm": torch.ones(7)}, metadata)
    refuses("is damaged: directions", tensors | {"directions": torch.ones(3)}, metadata)
    refuses("is damaged", tensors, metadata | {"concept": "[1"})
    deep = '{"prefix": "a", "name": "b", "questions": ' + "[" * 100_000 + "]" * 100_000 + "}"
    refuses("is damaged", tensors, metadata | {"concept": deep})
    for concept in ('{"prefix": 3, "name": "b"}', '{"prefix": "a"}', '"a"'):
        refuses("is damaged", tensors, metadata | {"concept": concept})
    questions = '{"prefix": "a", "name": "b", "questions": "why?"}'
    refuses("must be texts", tensors, metadata | {"concept": questions})
    directions, norms = tensors["directions"], tensors["resid_norm"]
    refuses("not finite", tensors | {"directions": torch.full((3, 4), torch.nan)}, metadata)
    refuses(
        r"unit norm nor zero, at block\(s\) 0, 1",
        tensors | {"directions": directions * torch.tensor([1.1, 0.5, 1])[:, None]},
        metadata,
    )
    refuses("must be of floats", tensors | {"directions": directions.int()}, metadata)
    refuses(
        r"negative or not finite, at block\(s\) 1",
        tensors | {"resid_norm": norms * torch.tensor([1, -1, 1])},
        metadata,
    )
    refuses("negative or not finite", tensors | {"resid_norm": norms * torch.inf}, metadata)
    refuses("no correlation", tensors | {"validation": torch.full((3,), 7.0)}, metadata)
    save_file(tensors, path, metadata=metadata)
    assert torch.equal(ConceptVectors.load(path).directions, directions)
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ConceptVectors.load(path)
    with pytest.raises(FileNotFoundError):
        ConceptVectors.load(tmp_path / "absent.safetensors")


def test_vectors_that_could_not_be_loaded_are_not_saved(tmp_path):
    found = fit(*made())
    with pytest.raises(ValueError, match="neither of unit norm nor zero"):
        replace(found, directions=2 * found.directions).save(tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "spiders.safetensors"
    fit(*made()).save(path)
    return path


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_file_with_any_bit_flipped_is_refused_by_its_name(saved, data):
    content = bytearray(saved.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = saved.with_name("flipped.safetensors")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="flipped.safetensors"):
        ConceptVectors.load(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_that_was_cut_off_is_refused_by_its_name(saved, data):
    content = saved.read_bytes()
    path = saved.with_name("short.safetensors")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="short.safetensors"):
        ConceptVectors.load(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            ConceptVectors.load(path)
    with (tmp_path / "vast").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="vast has 8,589,934,592 bytes"):
        ConceptVectors.load(tmp_path / "vast")
