"""A look at the model settles a recipe; vectors then know where and how far to push."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experimented import CONCEPTS, STATEMENTS, ByTheText

import lenskit as lk
from lenskit.concepts import statement_prompt
from lenskit.models import hooked
from lenskit.study.look import looked_at, settled

RECIPE = lk.recipes["lenskit"]
EVERYWHERE = replace(RECIPE, token="each", blocks="all")
QUICK = {"coefficients": (1.0, 2.0), "max_new_tokens": 3}


@pytest.fixture(scope="module")
def capture(model):
    prompts = lk.build_prompts(model, CONCEPTS[0], number=24, statements=STATEMENTS)
    return lk.capture(model, prompts, progress=False)


@pytest.fixture(scope="module")
def found(model, capture):
    return lk.look(model, capture, **QUICK)


def ids_of(prompts, row):
    return prompts.tokens.input_ids[row, prompts.tokens.attention_mask[row].bool()]


@torch.no_grad()
def streams(model, ids):
    """``resid_post`` of every block."""
    seen = []
    hooks = [
        (f"blocks.{block}.hook_resid_post", lambda value, hook: seen.append(value[0]))
        for block in range(model.cfg.n_layers)
    ]
    with hooked(model, hooks):
        model(ids[None])
    return torch.stack(seen)


@torch.no_grad()
def assert_is_the_divergence(model, found, *pair):
    p, q = (model(ids[None])[0, -1].log_softmax(dim=-1) for ids in pair)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(), atol=1e-4, rtol=1e-3)


def test_the_displacement_of_hard_labels_is_the_difference_of_the_means(capture, model):
    found = lk.fit_vectors(capture, labels="hard", recipe=EVERYWHERE, progress=False)
    prefixed = capture.prompts.has_prefix
    means = [capture.resid_post[own].mean(dim=0) for own in (prefixed, ~prefixed)]
    added = found.directions * found.displacement[..., None]
    # Directions are learnt from the first 80 % of the prompts.
    assert torch.cosine_similarity(added, means[0] - means[1], dim=-1).min() > 0.8
    along = ((means[0] - means[1]) * found.directions).sum(dim=-1)
    torch.testing.assert_close(along, found.displacement, atol=1e-4, rtol=1e-4)


def test_a_relative_coefficient_of_one_adds_the_displacement_at_each_closing_token(model, capture):
    recipe = replace(RECIPE, token="each", labels="hard", blocks="1")
    vectors = lk.fit_vectors(capture, recipe=recipe, progress=False)
    ids = ids_of(capture.prompts, 1)
    plain = streams(model, ids)
    with lk.steer(model, vectors, coefficient=1.0):
        moved = streams(model, ids)
    places = len(vectors.closing)
    expected = (vectors.directions * vectors.displacement[..., None])[1]
    torch.testing.assert_close(moved[1, -places:] - plain[1, -places:], expected, atol=1e-5, rtol=0)
    assert torch.equal(moved[0], plain[0])
    with lk.steer(model, vectors, recipe=replace(recipe, coefficient=1.0)):
        assert torch.equal(streams(model, ids), moved)
    with lk.steer(model, vectors, recipe="lenskit", coefficient=1.0):
        assert torch.equal(streams(model, ids), moved)


def test_increments_move_the_stream_by_the_displacement_at_every_block(model, capture):
    whole = lk.fit_vectors(capture, labels="hard", recipe=EVERYWHERE, progress=False)
    added = lk.increments(model, capture, whole)
    bare = (~capture.prompts.has_prefix).nonzero()[:, 0].tolist()
    moved = []
    for row in bare:
        ids = ids_of(capture.prompts, row)
        plain = streams(model, ids)
        with lk.steer(model, added, coefficient=1.0):
            moved.append((streams(model, ids) - plain)[:, -len(whole.closing) :])
    expected = whole.directions * whole.displacement[..., None]
    torch.testing.assert_close(torch.stack(moved).mean(dim=0), expected, atol=1e-4, rtol=1e-4)
    recipe = replace(EVERYWHERE, blocks="increments", labels="hard")
    again = lk.fit_vectors(capture, recipe=recipe, model=model, progress=False)
    assert torch.equal(again.directions, added.directions)


def test_vectors_with_displacements_are_kept_in_a_file(model, capture, tmp_path):
    vectors = lk.fit_vectors(capture, labels="hard", recipe=EVERYWHERE, progress=False)
    vectors.save(tmp_path / "v.safetensors")
    read = lk.ConceptVectors.load(tmp_path / "v.safetensors", model)
    assert torch.equal(read.displacement, vectors.displacement)
    assert torch.equal(read.unit, vectors.displacement) and read.closing == vectors.closing
    one = lk.fit_vectors(
        capture, labels="hard", recipe=replace(EVERYWHERE, token="-1"), progress=False
    )
    one.save(tmp_path / "one.safetensors")
    assert lk.ConceptVectors.load(tmp_path / "one.safetensors").displacement.shape == (3,)
    with pytest.raises(ValueError, match="displacements that are negative"):
        replace(one, displacement=-one.displacement).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="displacement must have one entry"):
        replace(vectors, displacement=torch.ones(3))


def test_divergence_labels_say_how_far_the_prefix_moves_the_next_token(model, capture):
    prompts = capture.prompts
    moved = lk.next_token_divergence(model, prompts)
    for row in (0, 4):
        prompt = statement_prompt(prompts.statements[row])
        bare = lk.chat_ids(model, [[{"role": "user", "content": prompt}]]).input_ids[0]
        assert_is_the_divergence(model, moved[row], ids_of(prompts, row), bare)
    assert bool((moved[1::2] == 0).all())
    # Of prompts that no template made the prefix's tokens are left out.
    rows = [ids_of(prompts, row) for row in (0, 1)]
    ids = [[*row.tolist()] for row in rows]
    own = lk.prompts_from_ids(model, "own", ids, prefixes=[(6, 9), None], candidates=2)
    bare = torch.cat([rows[0][:6], rows[0][9:]])
    assert_is_the_divergence(model, lk.next_token_divergence(model, own)[0], rows[0], bare)


def test_labels_by_divergence_are_measured_on_the_model(model, capture):
    moved = lk.next_token_divergence(model, capture.prompts)
    labels = lk.divergence_labels(capture, model=model)
    torch.testing.assert_close(labels[:, 0], moved / moved.max())
    with pytest.raises(ValueError, match="'divergence' are measured on the model"):
        lk.divergence_labels(capture)
    with pytest.raises(ValueError, match="give model=model"):
        lk.fit_vectors(capture, recipe=EVERYWHERE, progress=False)


def test_labels_by_divergence_fit_as_numbers_do(model, capture):
    labels = lk.divergence_labels(capture, model=model)
    named = lk.fit_vectors(capture, recipe=EVERYWHERE, model=model, progress=False)
    given = lk.fit_vectors(capture, labels=labels, recipe=EVERYWHERE, progress=False)
    assert torch.equal(named.directions, given.directions)
    assert torch.equal(named.displacement, given.displacement)
    recipe = replace(EVERYWHERE, blocks="increments")
    added = lk.fit_vectors(capture, recipe=recipe, model=model, progress=False)
    again = lk.increments(model, capture, given)
    assert torch.equal(added.directions, again.directions)


def test_a_look_takes_what_leaves_least_and_says_so(found, model):
    ways = found.table[["token", "blocks"]].drop_duplicates().apply(tuple, axis=1).tolist()
    blocks = [str(block) for block in range(model.cfg.n_layers)]
    assert ways == [("each", "increments"), *(("each", b) for b in blocks)] + [
        ("attention", b) for b in blocks
    ]
    best = found.table.loc[found.table["divergence"].idxmin()]
    recipe = found.recipe
    assert (recipe.token, recipe.blocks, recipe.coefficient) == tuple(
        best[["token", "blocks", "coefficient"]]
    )
    assert recipe.settled and not RECIPE.settled
    left = f"leaves {best['left']:.0%}"
    assert left in repr(found).splitlines()[0]
    assert f"{left} of the divergence from the prefixed model; next best: " in found.why
    assert found.concepts == ("cheerful",)


def test_divergences_are_those_of_the_steps_taken_one_by_one(found, model, capture):
    from lenskit.study.look import _prefixed

    base = _prefixed(model, capture, 3, 8)
    vectors = lk.fit_vectors(
        capture, recipe=replace(RECIPE, token="each", blocks="2"), model=model, progress=False
    )
    left = []
    for ids, length, expected in zip(base.ids, base.lengths, base.log_probs, strict=True):
        with torch.no_grad(), lk.steer(model, vectors, coefficient=2.0):
            got = model(torch.tensor([ids]))[0, length - 1 :].log_softmax(dim=-1)
        left.append((expected.exp() * (expected - got)).sum(dim=-1).mean())
    row = found.table.query("token == 'each' and blocks == '2' and coefficient == 2.0")
    assert float(torch.stack(left).mean()) == pytest.approx(row["divergence"].iloc[0], rel=1e-3)


def test_several_concepts_settle_one_recipe_and_a_named_part_is_left_alone(model, capture):
    fixed = replace(RECIPE, token="each")
    tables = [looked_at(model, capture, fixed, **QUICK) for _ in range(2)]
    tables[1]["divergence"] *= 3
    both = settled(fixed, tables, ["a", "b"])
    assert set(both.table["token"]) == {"each"} and both.concepts == ("a", "b")
    one = tables[0].set_index(["token", "blocks", "coefficient"])["divergence"]
    mean = both.table.set_index(["token", "blocks", "coefficient"])["divergence"]
    torch.testing.assert_close(
        torch.tensor(mean.to_numpy()), 2 * torch.tensor(one[mean.index].to_numpy())
    )
    assert both.unsteered == pytest.approx(2 * one[("", "", 0.0)])


def test_a_study_settles_its_variants_once_and_goes_on_from_its_folder(model, tmp_path):
    options = dict(
        prompts=24, statements=STATEMENTS, judge=ByTheText(), max_new_tokens=3, progress=False
    )
    first = lk.run_study(model, CONCEPTS, recipe="lenskit", out=tmp_path, **options)
    ways = first.answers[["token", "blocks"]].drop_duplicates()
    assert len(ways) == 1 and "look" not in ways.to_numpy()
    again = lk.run_study(model, CONCEPTS, recipe="lenskit", out=tmp_path, **options)
    assert again.answers.equals(first.answers)
    assert set(first.answers["coefficient"]) == {0.0, *RECIPE.coefficients}


def test_what_is_not_settled_or_does_not_fit_is_refused_with_what_would_work(model, capture):
    vectors = lk.fit_vectors(capture, progress=False)
    with pytest.raises(ValueError, match=r"settle it first: recipe=lk\.look"):
        lk.fit_vectors(capture, recipe="lenskit", progress=False)
    with (
        pytest.raises(ValueError, match="units of displacement, but the vectors"),
        lk.steer(model, vectors, recipe="lenskit"),
    ):
        pass
    with pytest.raises(ValueError, match="a look compares those of the displacement"):
        lk.look(model, capture, recipe="default")
    with pytest.raises(ValueError, match="needs a recipe whose unit is the displacement"):
        lk.run_study(model, CONCEPTS, lk.Variant("each", blocks="increments"), judge=ByTheText())
    with pytest.raises(ValueError, match="concepts is empty"):
        lk.look(model, [])
    with pytest.raises(ValueError, match="increments need the displacement of each closing token"):
        lk.increments(model, capture, vectors)


def test_a_recipe_gives_steering_its_blocks_and_unit(model, capture):
    vectors = lk.fit_vectors(capture, progress=False)
    ids = ids_of(capture.prompts, 1)
    with lk.steer(model, vectors, coefficient=2.0, recipe="paper"):
        found = streams(model, ids)
    with lk.steer(model, vectors, coefficient=2.0, relative=False, blocks=[1, 2]):
        assert torch.equal(streams(model, ids), found)
    rows = [lk.SteeringRow("Why?", vectors, 2.0)]
    one = lk.generate_steered(model, rows, recipe="paper", max_new_tokens=3)
    assert one == lk.generate_steered(model, rows, relative=False, blocks=[1, 2], max_new_tokens=3)
