"""Key projections: fitted against a dense oracle and planted data, saved, loaded and refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from steered import decoder_layers

import lenskit as lk
from lenskit.attention import contrast
from lenskit.models import head_hooks
from lenskit.vectors import checksum, read_safetensors

pytestmark = pytest.mark.usefixtures("nothing_left_on")

TEXTS = [
    ("The library opens at nine.", "at nine", "When does the library open?"),
    ("Rain falls on the hills.", "on the hills", "Where does rain fall?"),
    ("In 1984 the spiders were scary.", "spiders", "What was scary in 1984, spiders?"),
    ("Sunday is a cheerful day for the expert.", "cheerful", "What is Sunday like?"),
    ("The astronomer was late.", "astronomer", "Who was late?"),
]


def examples_of(model, irrelevant=True):
    others = [asked for *_, asked in TEXTS[1:] + TEXTS[:1]]
    return [
        lk.key_contrast(model, text, answer, asked, other if irrelevant else None)
        for (text, answer, asked), other in zip(TEXTS, others, strict=True)
    ]


@pytest.fixture(scope="module")
def fitted(model):
    return lk.fit_key_projections(model, examples_of(model), progress=False)


def test_an_example_reads_the_answers_tokens_in_its_context_alone(model):
    text, answer, asked = TEXTS[2]
    example = lk.key_contrast(model, text, answer, asked, "Who is late?")
    question = f"Question: {asked}\nContext: {text}"
    assert example.relevant == lk.span(model, question, answer, nth=1)
    assert example.neutral == lk.span(model, f"Context: {text}", answer)
    assert example.irrelevant == lk.span(model, f"Question: Who is late?\nContext: {text}", answer)


def test_an_example_of_other_tokens_or_without_its_answer_is_refused(model):
    text = "Rain, rain on the hills."
    with pytest.raises(ValueError, match="is not in the context"):
        lk.key_contrast(model, text, "snow", "What falls?")
    with pytest.raises(ValueError, match="occurs 2 times"):
        lk.key_contrast(model, text, "ain", "What falls?")
    assert lk.key_contrast(model, text, "ain", "What falls?", nth=-1)
    one, other = lk.span(model, text, "Rain"), lk.span(model, text, "hills")
    with pytest.raises(ValueError, match="different tokens"):
        lk.KeyContrast(one, other)


def keys_by_hand(hf_model, span):
    """Keys ``[block, token, kv_head, d_head]`` of one unpadded prompt, by PyTorch's own hooks."""
    found = []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda module, args, output: found.append(output[0, list(span.positions)])
        )
        for layer in decoder_layers(hf_model)
    ]
    with torch.no_grad():
        hf_model(torch.tensor([span.ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(found).unflatten(-1, (2, 8)).double().numpy()


def test_projections_masses_and_shifts_are_those_of_the_textbook(model, fitted):
    hf_model = tiny.reference_model(tiny.shared_folder())
    examples = examples_of(model)
    neutral, relevant, irrelevant = (
        np.concatenate([keys_by_hand(hf_model, each.spans[kind]) for each in examples], axis=1)
        for kind in range(3)
    )
    assert fitted.tokens == neutral.shape[1] and fitted.group == 2
    for block in range(3):
        for head in range(2):
            k, plus, minus = (each[block, :, head] for each in (neutral, relevant, irrelevant))
            projections = []
            for other in (plus, minus):
                u, s, _ = np.linalg.svd(k.T @ other / len(k))
                number = int((s.cumsum() / s.sum() < 0.9).sum()) + 1
                projections.append(u[:, :number] @ u[:, :number].T)
            assert np.allclose(fitted.positive[block, head], projections[0], atol=1e-4)
            assert np.allclose(fitted.negative[block, head], np.eye(8) - projections[1], atol=1e-4)
            shift = np.linalg.norm(plus - minus, axis=1).mean()
            assert float(fitted.shift[block, head]) == pytest.approx(shift, rel=1e-4)
            mean = plus.mean(axis=0)
            along = mean @ fitted.relevant[block, head].double().numpy()
            assert (along > -1e-4 * np.linalg.norm(mean)).all()


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma3"])
def test_neither_batches_nor_their_order_matter(architecture):
    model = tiny.shared_model(architecture)
    examples = examples_of(model)
    one = lk.fit_key_projections(model, examples, progress=False)
    other = lk.fit_key_projections(model, examples[::-1], batch_size=2, progress=False)
    assert torch.allclose(one.positive, other.positive, atol=1e-3)
    assert torch.allclose(one.shift, other.shift, rtol=1e-4)
    assert one.data_hash != other.data_hash


def test_a_batch_that_finds_no_memory_counts_once(model, fitted, monkeypatch):
    own, calls = contrast.read_heads, []

    def fails_at_its_end(*args):
        own(*args)
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(contrast, "read_heads", fails_at_its_end)
    found = lk.fit_key_projections(model, examples_of(model), progress=False)
    assert len(calls) > 2
    assert torch.allclose(found.shift, fitted.shift, rtol=1e-4)
    assert torch.allclose(found.relevant_mass, fitted.relevant_mass, rtol=1e-3, atol=1e-4)


def test_a_planted_subspace_is_recovered(model):
    """Keys lie in three directions; relevance strengthens the first two, another question none."""
    head_hooks(model)
    examples = examples_of(model) * 8
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    strength = {0: (1.0, 1.0, 0.3), 1: (4.0, 3.0, 0.3), 2: (0.1, 0.1, 3.0)}

    def plant(value, hook):
        planted, third = value.clone(), len(value) // 3
        latent = torch.randn(third, *value.shape[1:3], 3, generator=generator)
        for kind in range(3):
            own = latent * torch.tensor(strength[kind])
            planted[kind * third : (kind + 1) * third] = own @ basis[:, :3].T
        return planted

    with model.hooks(fwd_hooks=[("blocks.1.attn.k.hook_out", plant)]):
        found = lk.fit_key_projections(model, examples, progress=False)
    for head in range(2):
        first = basis[:, :2] @ basis[:, :2].T
        assert found.rank[1, head] == 2
        assert (found.positive[1, head] - first).norm() < 0.15
        # Of the irrelevant keys the third direction holds most, which P⁻ leaves out.
        without = torch.eye(8) - found.negative[1, head]
        assert float(basis[:, 2] @ without @ basis[:, 2]) > 0.9
    assert found.shift[1].min() > 2 and set(found.heads(2)) == set(lk.Heads({1: range(4)}))


def test_without_irrelevant_questions_there_is_no_negative_projection(model, fitted):
    found = lk.fit_key_projections(model, examples_of(model, irrelevant=False), progress=False)
    assert torch.allclose(found.relevant_mass, fitted.relevant_mass, rtol=1e-3, atol=1e-4)
    assert not found.negative.any() and not found.irrelevant.any()
    # The keys of the first block know nothing of a question.
    assert found.shift[1:].min() > 0 and found.shift[0].max() < 1e-4
    with pytest.raises(ValueError, match="nothing to act on"):
        lk.Seka(found, 1.0, 0.5)
    mixed = [*examples_of(model)[:1], *examples_of(model, irrelevant=False)[1:]]
    with pytest.raises(ValueError, match="some lack it"):
        lk.fit_key_projections(model, mixed)
    with pytest.raises(ValueError, match="examples is empty"):
        lk.fit_key_projections(model, [])
    with pytest.raises(ValueError, match="mass must be a share"):
        lk.fit_key_projections(model, examples_of(model), mass=90)


def test_edits_around_a_fit_are_left_out(model, fitted):
    span = lk.span(model, "Rain?", "Rain")
    seka = lk.Seka(fitted, 2.0)
    with lk.attend(model, [span, None], seka, heads=lk.Heads.all(model)):
        found = lk.fit_key_projections(model, examples_of(model), progress=False)
    assert torch.allclose(found.shift, fitted.shift, rtol=1e-4)


def test_heads_are_chosen_by_number_or_by_shift_with_their_whole_group(fitted):
    flat = fitted.shift.flatten()
    best = divmod(int(flat.argmax()), 2)
    assert fitted.heads(1) == lk.Heads({best[0]: [2 * best[1], 2 * best[1] + 1]})
    assert len(fitted.heads(6)) == 12 and fitted.heads(2) <= fitted.heads(3)
    assert fitted.heads(shift=float(flat.sort().values[-2])) == fitted.heads(2)
    for options in ({}, {"number": 2, "shift": 0.1}, {"number": 7}, {"shift": 1e9}):
        with pytest.raises(ValueError):
            fitted.heads(**options)


def test_random_projections_have_the_same_ranks_and_other_directions(fitted):
    one, other = fitted.random(0), fitted.random(1)
    assert torch.equal(one.rank, fitted.rank) and torch.equal(one.shift, fitted.shift)
    assert torch.allclose(one.positive @ one.positive, one.positive, atol=1e-5)
    assert not torch.allclose(one.positive, other.positive, atol=0.1)
    assert torch.equal(one.positive, fitted.random(0).positive)


def test_a_saved_file_comes_back_and_belongs_to_its_model(fitted, model, tmp_path):
    path = tmp_path / "keys.safetensors"
    fitted.save(path)
    back = lk.KeyProjections.load(path, model)
    assert all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(vars(back).values(), vars(fitted).values(), strict=True)
    )
    other = tiny.shared_model("qwen2")
    with pytest.raises(ValueError, match="were fitted on model"):
        lk.KeyProjections.load(path, other)
    span = lk.span(other, "Rain?", "Rain")
    with pytest.raises(ValueError, match="were fitted on model"):
        with lk.attend(other, span, lk.Seka(back), heads=back.heads(1)):
            pass
    assert "rank" in repr(back) and len(repr(back).splitlines()) < 12


def test_a_file_that_is_not_as_it_was_written_is_refused(fitted, tmp_path):
    path = tmp_path / "keys.safetensors"
    fitted.save(path)
    tensors, metadata = read_safetensors(path)

    def refused(message, tensors=tensors, **changed):
        own = {**metadata, **changed}
        if "checksum" not in changed:
            del own["checksum"]
            own["checksum"] = checksum(tensors, own)
        save_file(tensors, path, metadata=own)
        with pytest.raises(ValueError, match=message):
            lk.KeyProjections.load(path)

    refused("damaged", checksum="0")
    refused("no key projections", format="other")
    refused("format version", format_version="9")
    refused("damaged.*orthonormal", {**tensors, "relevant": 2 * tensors["relevant"]})
    refused("damaged.*negative", {**tensors, "shift": -tensors["shift"]})
    refused("damaged.*finite", {**tensors, "shift": tensors["shift"] * float("nan")})
    refused("damaged.*shape", {**tensors, "shift": tensors["shift"][:1]})
    refused("lacks shift", {name: each for name, each in tensors.items() if name != "shift"})
    refused("damaged", mass="2.0")
    assert load_file(path)
    with pytest.raises(ValueError, match="orthonormal"):
        replace(fitted, relevant=fitted.relevant * 2).save(path)
