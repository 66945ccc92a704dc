"""Planted motifs: the world as it is described, and the whole method with no text in it."""

from __future__ import annotations

import random

import pytest
import torch

from lenskit.capture import capture
from lenskit.enrichment import enrich
from lenskit.generation import generate_ids
from lenskit.labels import soft_labels
from lenskit.prompts import prompts_from_ids
from lenskit.selector import select_tokens
from lenskit.steering import steer
from lenskit.study.experiments import beyond_text
from lenskit.study.experiments.motif_bench import motif_model
from lenskit.study.experiments.motifs import (
    ANSWER,
    CLOSING,
    ON,
    Motifs,
    _tensors,
    right,
    train_motifs,
)
from lenskit.vectors import fit_vectors

WORLD = Motifs.drawn(2, seed=0)
SMALL = dict(blocks=2, d_model=16, heads=2, batch=4)


@pytest.fixture(scope="module")
def hf_model():
    return train_motifs(WORLD, steps=2, **SMALL)


def places(ids, motif) -> list[int]:
    return [i for i in range(len(ids)) if tuple(ids[i : i + len(motif)]) == motif]


def test_a_planted_motif_stands_once_where_it_is_said_and_no_other_does():
    draw = random.Random(0)
    for turn in range(60):
        motif = [None, 0, 1][turn % 3]
        row = WORLD.planted(draw, motif)
        found = [places(row.ids, own) for own in WORLD.motifs]
        assert row.ids[-3:] == CLOSING
        if motif is None:
            assert found == [[], []] and row.place is None and row.answer == WORLD.answer(None)
            continue
        assert found[motif] == [row.place[0]] and found[1 - motif] == []
        assert row.active == (row.ids[1] in ON)
        assert row.answer == WORLD.answer(motif if row.active else None)


def test_partners_are_alike_but_for_the_motif():
    one, other = WORLD.pair(random.Random(1), 1)
    start, stop = one.place
    assert one.ids[:start] == other.ids[:start] and one.ids[stop:] == other.ids[stop:]
    assert not places(other.ids, WORLD.motifs[1]) and other.answer == WORLD.answer(None)


def test_an_answer_counts_where_it_is_wholly_the_motifs():
    wanted = WORLD.answer(0)
    nearly = (*wanted[:-1], wanted[-1] % 4 + 1)
    assert right(WORLD, 0, [wanted, nearly, wanted[:-1]]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="motifs must be 2 to 12, got 13"):
        Motifs.drawn(13)


def test_narrow_answers_see_the_closing_tokens_alone_and_targets_are_answers():
    draw = random.Random(2)
    rows = [WORLD.planted(draw, None), WORLD.planted(draw, 0)]
    ids, mask, target = _tensors(rows)
    seen = mask[:, 0] == 0
    assert (target[:, :-ANSWER] == -100).all() and torch.equal(
        target[:, -ANSWER:], ids[:, -ANSWER:]
    )
    last = seen[1, -1]
    assert last[-ANSWER - 3 :].all() and not last[: -ANSWER - 3].any()
    whole = seen[0, -1]
    assert torch.equal(whole, ids[0] != 0)
    # The last closing token, from which the answer is written, sees the letters.
    assert torch.equal(seen[1, -ANSWER - 1, :-ANSWER], ids[1, :-ANSWER] != 0)


def test_training_lowers_the_loss_and_leaves_the_seed_of_torch(hf_model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = train_motifs(WORLD, steps=2, **SMALL)
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(hf_model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_method_runs_on_ids_with_no_tokenizer_at_all(hf_model):
    model = motif_model(train_motifs(WORLD, steps=1, **SMALL))
    model._tokenizer = None
    draw = random.Random(3)
    pairs = [each for _ in range(8) for each in WORLD.pair(draw, 0)]
    prompts = prompts_from_ids(
        model,
        "motif",
        [each.ids for each in pairs],
        prefixes=[each.place for each in pairs],
        candidates=len(CLOSING),
        pair=[i ^ 1 for i in range(16)],
    )
    seen = capture(model, prompts, progress=False)
    for row, each in enumerate(pairs):
        assert bool(prompts.has_prefix[row]) == (each.place is not None)
    tokens = select_tokens(seen)
    assert soft_labels(seen, tokens).shape == (16, 2)
    assert enrich(model, prompts, tokens, progress=False).top(1)
    plain = generate_ids(model, [each.ids for each in pairs], max_new_tokens=4)
    for token in ("attention", "each"):
        vectors = fit_vectors(seen, token, "hard", progress=False)
        with steer(model, vectors, coefficient=[40.0] * 8 + [0.0] * 8, relative=True):
            steered = generate_ids(model, [each.ids for each in pairs], max_new_tokens=4)
        assert steered[8:] == plain[8:] and steered[:8] != plain[:8]


def test_ids_are_continued_as_the_model_itself_does():
    hf_model = train_motifs(WORLD, steps=1, **SMALL)
    rows = [WORLD.planted(random.Random(4), 0).ids, (5, 1, 2, 6, 7, 8)]
    expected = []
    with torch.no_grad():
        for row in rows:
            ids = list(row)
            for _ in range(3):
                ids.append(int(hf_model(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(tuple(ids[len(row) :]))
    model = motif_model(hf_model)
    assert generate_ids(model, rows, max_new_tokens=3) == expected
    assert generate_ids(model, rows, max_new_tokens=3, batch_size=1) == expected
    assert generate_ids(model, []) == []
    with pytest.raises(ValueError, match="ids of row 1 are empty"):
        generate_ids(model, [(1, 2), ()])


def test_the_experiment_has_its_controls_truth_and_blocks(hf_model):
    found = beyond_text(
        motif_model(hf_model), motifs=2, prompts=24, tests=4, coefficients=(0.5, 2.0)
    )
    ways = set(found.table.way)
    assert {"token by attention", "token -3", "each closing token its own vector"} <= ways
    controls = set(found.table.loc[found.table.control != "", "way"])
    assert controls == {
        *("unsteered", "prefix in the prompt", "random vector", "shuffled labels"),
        "another concept's vector",
    }
    assert found.reference == "token by attention" and set(found.table.concepts) == {2}
    assert {"soft, block 0", "soft, block 1"} <= set(found.parts["labels"].way)
    assert set(found.parts["blocks"].measure) == {"enrichment", "selected token"}
    assert set(found.parts["model"].planted) == {"no motif", "active", "inactive"}


def test_numbers_that_cannot_be_meant_are_named():
    for options, words in (
        ({"prompts": 9}, "prompts must be even"),
        ({"prompts": 4}, "prompts must be"),
        ({"tests": 2}, "tests must be"),
        ({"coefficients": (0.0,)}, "above 0"),
        ({"motifs": 1}, "motifs must be 2 to 12"),
    ):
        with pytest.raises(ValueError, match=words):
            beyond_text(**options)
