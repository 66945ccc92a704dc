"""Models of several depths, and checkpoints of one: every block of each, by relative depth."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import tiny
import torch
from experimented import CONCEPTS, OPTIONS, ByTheText
from sklearn.metrics import roc_auc_score

from lenskit.capture import capture
from lenskit.concepts import concepts
from lenskit.embedded.sizes import learnt_by_all
from lenskit.enrichment import enrich
from lenskit.labels import gating_head, true_activity
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.recipes import DEFAULT
from lenskit.selector import select_tokens
from lenskit.study.experiments import model_folders, sizes, trained_on
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.depth import BY_BLOCK, Depth, most_varying
from lenskit.study.experiments.setting import Setting
from lenskit.study.experiments.sizes import _STEERED as STEERED
from lenskit.study.experiments.sizes import _depths as depths
from lenskit.vectors import LEARNERS

QUICK = OPTIONS | {"coefficients": (2.0,), "prompts": 12}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    two = tiny.tiny_folder(tmp_path_factory.mktemp("two") / "two", num_hidden_layers=2)
    models = {
        "three": tiny.shared_model(),
        "two": lambda: load_model(two, device="cpu", check="hooks"),
    }
    return sizes(models, CONCEPTS, judge=ByTheText(), **QUICK)


def test_every_model_has_its_blocks_by_relative_depth_and_its_own_figures(found):
    blocks = found.parts["by block"]
    own = blocks[blocks.concept_class == "all"].groupby("model")
    assert sorted(set(own.get_group("three")["relative depth"])) == [0.0, 0.5, 1.0]
    assert sorted(set(own.get_group("two")["relative depth"])) == [0.0, 1.0]
    assert {*BY_BLOCK, "steered alone, held out"} == set(blocks.measure)
    assert list(dict.fromkeys(found.table.way)) == ["three", "two"]
    assert {"prompted", "steered, all blocks", "steered, one block", "gates"} <= set(found.measures)
    concepts_rows = found.parts["by concept"].set_index(["model", "concept"])
    # Where no block is enriched there is no depth.
    depths = concepts_rows["depth of enrichment"].dropna()
    assert len(depths) and depths.between(0, 1).all()
    rows = found.table[(found.table.way == "two") & (found.table.concept_class == "all")]
    both = found.table[(found.table.way == "three") & (found.table.concept_class == "all")]
    one, other = (each.set_index("measure")["mean"]["prompted"] for each in (rows, both))
    difference = rows.set_index("measure")["difference"]["prompted"]
    assert difference == pytest.approx(one - other)
    shares = found.parts["selected tokens"].groupby(["model", "block"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1.0)
    assert any(note.startswith("two: ") for note in found.notes)


def test_the_measures_of_a_block_are_those_of_the_steps_taken_one_by_one():
    model, concept = tiny.shared_model(), concepts["fears"]["spiders"]
    bench = Bench(model, concept, 24, 0, LEARNERS, DEFAULT, None)
    rates = {name: {t: float(i % 2) for i, t in enumerate(own)} for name, own in _rates().items()}
    rows = Depth(rates)(bench, Setting(prompts=24, judge=ByTheText()))
    own = {(row["measure"], row["block"]): row["value"] for row in rows}
    split = capture(model, build_prompts(model, concept, number=24), progress=False)
    prompts = build_prompts(model, concept, number=24, layout="paired")
    seen, tokens = capture(model, prompts, progress=False), select_tokens(split)
    truth = true_activity(prompts, rates)[prompts.has_prefix]
    scores = enrich(model, prompts, tokens, progress=False).scores
    soft = tokens.take(seen.attention_to_prefix.mean(2))[prompts.has_prefix]
    for block in range(3):
        assert own["enrichment", block] == pytest.approx(float(scores[block]))
        assert own["selected token", block] == tokens.offsets[block]
        expected = roc_auc_score((truth > 0.5).numpy(), soft[:, block].numpy())
        assert own["soft label AUROC", block] == pytest.approx(expected)
    head = gating_head(seen)
    torch.testing.assert_close(
        most_varying(seen)[prompts.has_prefix, head.block], head.attention[prompts.has_prefix]
    )
    assert own["gating head AUROC", None] == own["gating AUROC", head.block]


def _rates():
    return trained_on("data/lenskit-mini")


def test_folders_are_models_or_hold_checkpoints_in_the_order_of_their_steps(tmp_path):
    for name in ("run/checkpoint-1000", "run/checkpoint-250", "other/model", "a/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    found = model_folders([tmp_path / "run"])
    assert list(found) == ["checkpoint-250", "checkpoint-1000"]
    both = model_folders([tmp_path / "other" / "model", tmp_path / "a" / "model"])
    assert list(both) == ["other/model", "a/model"]
    with pytest.raises(ValueError, match="neither a model's folder"):
        model_folders([tmp_path / "other"])
    with pytest.raises(ValueError, match="given twice"):
        model_folders([tmp_path / "a" / "model", tmp_path / "a" / "model"])


def test_concepts_are_those_that_every_model_was_trained_on(tmp_path):
    for name, number in (("few", 10), ("some", 40), ("all", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps({"concepts": number}))
    learnt = [learnt_by_all([tmp_path / name], 5) for name in ("few", "some", "all")]
    assert all(len(each) == 5 for each in learnt)
    few = {c.name for c in learnt_by_all([tmp_path / "few"], 10)}
    assert {c.name for c in learnt_by_all([tmp_path / "all", tmp_path / "few"], 5)} <= few
    with pytest.raises(ValueError, match="does not spread evenly"):
        learnt_by_all([tmp_path / "few"], 15)


def test_depths_are_weighted_by_enrichment_and_of_the_best_blocks():
    rows = [("enrichment", 0.0, 1.0), ("enrichment", 0.5, 3.0), ("enrichment", 1.0, 0.0)]
    rows += [(STEERED, 0.0, 0.5), (STEERED, 0.5, 0.5), (STEERED, 1.0, 0.2)]
    table = pd.DataFrame(rows, columns=["measure", "relative depth", "value"])
    found = depths(table.assign(concept_class="x", concept="y"))
    assert found.loc[("x", "y")].tolist() == [0.375, 0.25]
    none = depths(table.assign(concept_class="x", concept="y", value=0.0))
    assert none.isna().all(axis=None)


def test_no_models_are_refused():
    with pytest.raises(ValueError, match="models is empty"):
        sizes({}, CONCEPTS)
