"""Vectors that leave for and enter from llama.cpp, repeng and steering-vectors."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lenskit.concepts import Concept
from lenskit.exchange import (
    from_layers,
    read_gguf,
    read_layers,
    to_layers,
    write_gguf,
    write_layers,
)
from lenskit.models import model_fingerprint
from lenskit.steering import steer
from lenskit.vectors import ConceptVectors
from tests.steered import plain_hooks
from tests.tiny import reference_model, shared_folder, shared_model

gguf = pytest.importorskip("gguf")

SPIDERS = Concept("Personify someone who is terrified of spiders.", "spiders", "fears")
IDS = torch.tensor([[1, 40, 41, 42, 43]])


def drawn(seed: int = 0) -> ConceptVectors:
    """Unit vectors of no meaning for the tiny model."""
    cfg = shared_model().cfg
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(cfg.n_layers, cfg.d_model, generator=generator)
    return ConceptVectors(
        directions=directions / directions.norm(dim=1, keepdim=True),
        validation=torch.rand(cfg.n_layers, generator=generator),
        resid_norm=1 + 4 * torch.rand(cfg.n_layers, generator=generator),
        model=model_fingerprint(shared_model()),
        concept=SPIDERS,
        learner="rfm",
        selection="attention",
        labels="soft",
        data_hash="0123",
        version="0.1.0",
    )


def steered_logits(vectors: ConceptVectors, **how) -> torch.Tensor:
    with torch.no_grad(), steer(shared_model(), vectors, **how):
        return shared_model().original_model(IDS).logits


def hooked_logits(additions: dict[int, torch.Tensor]) -> torch.Tensor:
    hf_model = reference_model(shared_folder())
    with torch.no_grad(), plain_hooks(hf_model, additions):
        return hf_model(IDS).logits


def as_llama_cpp_adds(path: Path, strength: float, n_layers: int) -> dict[int, torch.Tensor]:
    """What llama.cpp adds to the output of each block, after its loader and its adapter.

    The loader lays layer N at place N - 1 of one flat buffer, scaled; the adapter takes the
    tensor of block il, for il from 1, from place il - 1.
    """
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    width, flat = -1, np.zeros(0, np.float32)
    for tensor in reader.tensors:
        number = int(tensor.name.split(".")[1])
        assert tensor.name.startswith("direction.") and number >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
        width = tensor.n_elements
        flat = np.pad(flat, (0, max(0, width * number - len(flat))))
        flat[width * (number - 1) : width * number] += np.float32(strength) * tensor.data
    return {
        il: torch.from_numpy(flat[width * (il - 1) : width * il])
        for il in range(1, n_layers)
        if width * il <= len(flat)
    }


def written(path: Path, tensors: dict[str, np.ndarray], arch="controlvector", **numbers) -> Path:
    """A GGUF file written with the package's own writer."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "llama")
    for name, number in numbers.items():
        writer.add_uint32(f"controlvector.{name}", number)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def array(seed: int = 0, width: int | None = None) -> np.ndarray:
    width = shared_model().cfg.d_model if width is None else width
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


# ---- dictionaries


def test_a_block_keeps_its_number_and_the_first_stays_at_home():
    vectors = drawn()
    layers = to_layers(vectors)
    assert list(layers) == list(range(1, len(vectors.directions)))
    for layer, vector in layers.items():
        assert vector.dtype == np.float32 and vector.shape == (vectors.directions.shape[1],)
        assert np.array_equal(vector, vectors.directions[layer].numpy())
    assert list(to_layers(vectors, blocks=[2, 0])) == [0, 2]


def test_coefficients_and_relative_ones_scale_the_vectors():
    vectors = drawn()
    for layer, vector in to_layers(vectors, coefficient=-2.0, relative=True).items():
        expected = -2.0 * vectors.resid_norm[layer] * vectors.directions[layer]
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-6)


def test_the_arrays_are_copies():
    vectors = drawn()
    before = vectors.directions.clone()
    to_layers(vectors)[1][:] = 0
    assert torch.equal(vectors.directions, before)


@pytest.mark.parametrize("blocks", [[], [-1], [99]])
def test_blocks_that_the_vectors_have_not_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks (is empty|must be different)"):
        to_layers(drawn(), blocks=blocks)


def test_numbers_that_are_not_finite_do_not_leave():
    with pytest.raises(ValueError, match="not finite"):
        to_layers(drawn(), coefficient=float("inf"))


def test_vectors_enter_with_their_norm_as_the_unit():
    given = {1: 3 * array(1), 2: torch.from_numpy(array(2)).to(torch.bfloat16)}
    read = from_layers(given, shared_model(), concept=SPIDERS)
    assert read.concept == SPIDERS and read.model == model_fingerprint(shared_model())
    norms = [0.0, 3 * np.linalg.norm(array(1)), float(given[2].double().norm())]
    np.testing.assert_allclose(read.resid_norm[:3], norms, rtol=1e-6)
    np.testing.assert_allclose(read.directions[1], given[1] / norms[1], rtol=1e-5)
    assert not read.directions[0].any() and bool(read.validation.isnan().all())
    again = to_layers(read, relative=True)
    assert list(again) == [1, 2]
    np.testing.assert_allclose(again[1], given[1], rtol=1e-5)


def test_what_enters_steers_as_it_did_on_the_other_side():
    """repeng and steering-vectors add factor times vector to the output of decoder layer l."""
    given = {0: array(0), 2: 2 * array(2)}
    read = from_layers(given, shared_model())
    expected = hooked_logits({layer: 0.7 * torch.from_numpy(v) for layer, v in given.items()})
    torch.testing.assert_close(
        steered_logits(read, coefficient=0.7, relative=True), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "holds no vector"),
        ({1: array(width=7)}, r"shape \[7\], but the model's d_model is"),
        ({1: array()[None]}, r"shape \[1, "),
        ({99: array()}, "layer 99 is not among the model's blocks 0 to"),
        ({-1: array()}, "layer -1 is not among"),
        ({"1": array()}, "layer '1' is not a whole number"),
        ({1: 0 * array()}, "zero or not finite"),
        ({1: np.nan * array()}, "zero or not finite"),
    ],
)
def test_vectors_that_do_not_fit_the_model_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        from_layers(layers, shared_model())


def test_vectors_for_other_places_than_the_output_of_a_block_are_refused():
    with pytest.raises(ValueError, match="layer_type 'mlp' is not where"):
        from_layers({1: array()}, shared_model(), layer_type="mlp")


# ---- safetensors


@pytest.mark.parametrize(
    ("library", "attribute"), [("repeng", "directions"), ("steering-vectors", "layer_activations")]
)
def test_a_safetensors_file_holds_the_dictionary_of_each_library(tmp_path, library, attribute):
    vectors = drawn()
    path = write_layers(vectors, tmp_path / "v.safetensors", library, relative=True)
    held = {int(name.removeprefix(f"{attribute}.")): v for name, v in load_file(path).items()}
    expected = to_layers(vectors, relative=True)
    assert held.keys() == expected.keys()
    assert all(np.array_equal(held[layer], expected[layer]) for layer in held)
    read = read_layers(path, shared_model())
    assert (read.concept, read.learner) == (SPIDERS, "rfm")
    torch.testing.assert_close(read.directions[1:], vectors.directions[1:])
    torch.testing.assert_close(read.resid_norm[1:], vectors.resid_norm[1:])


def test_a_safetensors_file_of_somebody_else_is_read_or_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    save_file({"layer_activations.2": array()}, path, metadata={"layer_type": "self_attn"})
    with pytest.raises(ValueError, match="v.safetensors: layer_type 'self_attn'"):
        read_layers(path, shared_model())
    save_file({"layer_activations.2": array()}, path)
    assert read_layers(path, shared_model()).resid_norm.nonzero().tolist() == [[2]]
    save_file({"lm_head.weight": array()}, path)
    with pytest.raises(ValueError, match="expected directions.N or layer_activations.N"):
        read_layers(path, shared_model())
    with pytest.raises(ValueError, match="library must be one of"):
        write_layers(drawn(), path, "pickle")


# ---- GGUF


def test_a_gguf_file_has_the_fields_and_tensors_of_a_control_vector(tmp_path):
    vectors = drawn()
    path = write_gguf(vectors, tmp_path / "new" / "v.gguf", model_hint="llama")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    number = len(vectors.directions) - 1
    assert reader.get_field("controlvector.layer_count").contents() == number
    names = [tensor.name for tensor in reader.tensors]
    assert names == [f"direction.{n}" for n in range(1, number + 1)]
    for tensor in reader.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, vectors.directions[layer].numpy())
    assert [file.name for file in path.parent.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize("relative", [False, True])
def test_llama_cpp_adds_what_steer_adds(tmp_path, relative):
    vectors = drawn()
    path = write_gguf(vectors, tmp_path / "v.gguf", coefficient=0.5, relative=relative)
    number = len(vectors.directions)
    expected = hooked_logits(as_llama_cpp_adds(path, 3.0, number))
    found = steered_logits(vectors, coefficient=1.5, relative=relative, blocks=range(1, number))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    read = read_gguf(path, shared_model())
    torch.testing.assert_close(
        steered_logits(read, coefficient=3.0, relative=True), expected, atol=1e-5, rtol=1e-5
    )


def test_a_gguf_file_is_read_with_what_it_says_of_itself(tmp_path):
    vectors = drawn()
    read = read_gguf(write_gguf(vectors, tmp_path / "v.gguf", blocks=[2]), shared_model())
    assert (read.concept, read.learner, read.model) == (SPIDERS, "rfm", vectors.model)
    torch.testing.assert_close(read.directions[2], vectors.directions[2])
    assert read.resid_norm.count_nonzero() == 1
    own = Concept("Take on a calm mood.", "calm")
    assert read_gguf(tmp_path / "v.gguf", shared_model(), concept=own).concept == own


def test_a_file_of_another_writer_is_read(tmp_path):
    """As repeng writes it, with the layer 0 that llama.cpp would refuse."""
    tensors = {f"direction.{n}": array(n) for n in (2, 0, 1)}
    read = read_gguf(written(tmp_path / "v.gguf", tensors, layer_count=3), shared_model())
    for layer in range(3):
        expected = torch.from_numpy(array(layer))
        torch.testing.assert_close(read.directions[layer] * read.resid_norm[layer], expected)
    assert (read.learner, read.concept.name) == ("imported", "imported")


def test_the_first_block_cannot_go_to_llama_cpp(tmp_path):
    with pytest.raises(ValueError, match="can add nothing to the first block"):
        write_gguf(drawn(), tmp_path / "v.gguf", blocks=[0, 1])
    assert list(tmp_path.iterdir()) == []


def test_zeros_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="nothing to write"):
        write_gguf(drawn(), tmp_path / "v.gguf", coefficient=0.0)
    with pytest.raises(ValueError, match="nothing to write"):
        write_layers(drawn(), tmp_path / "v", "repeng", coefficient=0.0)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"direction.1": array()}, {"arch": "llama"}, "no control vector: .* is 'llama'"),
        ({"direction.one": array()}, {}, "holds 'direction.one'"),
        ({"token_embd.weight": array()}, {}, "holds 'token_embd.weight'"),
        ({"direction.1": array().astype(np.float16)}, {}, "direction.1 is F16"),
        ({"direction.1": array(width=5)}, {}, r"v.gguf: layer 1 .* \[5\]"),
        ({"direction.77": array()}, {}, "layer 77 is not among"),
        ({"direction.1": array()}, {"layer_count": 80}, "counts 80 layers, but the model has"),
        ({"direction.1": array().reshape(2, -1)}, {}, "has a vector of shape"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_refused(tmp_path, tensors, settings, message):
    path = written(tmp_path / "v.gguf", tensors, **settings)
    with pytest.raises(ValueError, match=message):
        read_gguf(path, shared_model())


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_vectors_of_other_weights_are_admitted_only_when_asked_for(tmp_path, form):
    vectors = replace(drawn(), model="other:0123")
    path = tmp_path / "v"
    if form == "gguf":
        read = read_gguf
        write_gguf(vectors, path)
    else:
        read = read_layers
        write_layers(vectors, path, "repeng")
    with pytest.raises(ValueError, match="written for the model other:0123.*other_model=True"):
        read(path, shared_model())
    assert read(path, shared_model(), other_model=True).model == model_fingerprint(shared_model())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_gguf(drawn(), tmp_path / "v.gguf")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_gguf(drawn(1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'lenskit\[gguf\]'"):
        write_gguf(drawn(), tmp_path / "v.gguf")
    with pytest.raises(ImportError, match="need the package gguf"):
        read_gguf(tmp_path / "v.gguf", shared_model())


def test_what_entered_can_be_saved_and_loaded(tmp_path):
    read = from_layers({1: array()}, shared_model(), concept=SPIDERS)
    read.save(tmp_path / "v.safetensors")
    loaded = ConceptVectors.load(tmp_path / "v.safetensors", shared_model())
    assert torch.equal(loaded.directions, read.directions)
    assert (loaded.concept, loaded.learner) == (SPIDERS, "imported")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each form, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    write_gguf(drawn(), folder / "v.gguf")
    write_layers(drawn(), folder / "v.safetensors", "repeng")
    return {read_gguf: folder / "v.gguf", read_layers: folder / "v.safetensors"}


@pytest.mark.parametrize("read", [read_gguf, read_layers])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_by_its_name_or_read_as_it_was(files, read, data):
    content = bytearray(files[read].read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path = files[read].with_name("damaged")
    path.write_bytes(content)
    try:
        found = read(path, shared_model())
    except ValueError as error:
        assert str(path) in str(error)
    else:
        # A bit of the notes, or one that makes another number of a layer, is not the vectors'.
        expected = drawn().directions[1:]
        rows = found.directions[found.directions.any(dim=1)]
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(
    "names", [("directions.1", "directions.01"), ("directions.1", "layer_activations.1")]
)
def test_a_block_that_a_file_names_twice_is_refused(tmp_path, names):
    path = tmp_path / "v.safetensors"
    save_file({name: array(seed) for seed, name in enumerate(names)}, path)
    with pytest.raises(ValueError, match="v.safetensors holds more than one vector for layer 1"):
        read_layers(path, shared_model())


def test_a_gguf_file_that_names_a_block_twice_is_refused(tmp_path):
    path = written(tmp_path / "v.gguf", {"direction.1": array(), "direction.01": array(1)})
    with pytest.raises(ValueError, match="v.gguf holds more than one vector for layer 1"):
        read_gguf(path, shared_model())


@pytest.mark.parametrize("number", ["١", "-1", "1e3", "", "9999999999999999999"])
def test_a_layer_that_is_no_number_is_refused(tmp_path, number):
    path = tmp_path / "v.safetensors"
    save_file({f"directions.{number}": array()}, path)
    with pytest.raises(ValueError, match="v.safetensors"):
        read_layers(path, shared_model())


@pytest.mark.parametrize("read", [read_gguf, read_layers])
def test_what_is_no_file_of_that_form_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read(path, shared_model())
    for content in (b"", b"GGUF", "größer".encode("latin-1"), b"{" * 10_000, b"\0" * 100):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / 'text'} is no"):
            read(tmp_path / "text", shared_model())
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent", shared_model())


def test_vectors_of_whole_numbers_or_too_large_for_float32_do_not_enter():
    for vector in (np.ones(32, dtype=int), np.full(32, 1e39), np.full(32, 1e-60)):
        with pytest.raises(ValueError, match="layer 1 has a vector"):
            from_layers({1: vector}, shared_model())
