from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from captures import captured_with

from lenskit.embedded import ablation, measures
from lenskit.embedded.card import write_card
from lenskit.embedded.corpus import MIXTURE
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.recipe import Recipe, mixture_at

GRAMMAR = load_grammar()


def test_the_gating_labels_auroc_is_over_clear_prefixed_prompts(monkeypatch):
    attention = torch.zeros(12, 1, 1, 2)
    rate = torch.tensor([0.97, 0, 0.03, 0, 0.95, 0, 0.02, 0, 0.5, 0, 0.03, 0])
    attention[::2, 0, 0, 0] = torch.tensor([0.6, 0.1, 0.7, 0.65, 0.0, 0.2])
    monkeypatch.setattr(measures, "true_activity", lambda prompts: rate)
    # Of the six pairs of active and inactive one is the wrong way round.
    assert measures.gating_auroc(captured_with(attention)) == pytest.approx(5 / 6)


def test_auroc_counts_pairs_in_order_and_is_undefined_without_both_kinds():
    label = torch.tensor([0.1, 0.4, 0.4, 0.9])
    assert measures.auroc(label, torch.tensor([False, True, False, True])) == pytest.approx(0.875)
    for same in (True, False):
        assert measures.auroc(label, torch.full((4,), same)) != measures.auroc(
            label, torch.full((4,), same)
        )


def test_each_recipe_of_the_ablation_has_one_ingredient_more_than_the_one_before():
    recipes = list(ablation.ablated().values())
    assert len(recipes) == 4 and recipes[-1] == ablation.REDUCED
    assert [recipe.price for recipe in recipes] == [0, 0, 0.1, 0.1]
    assert [recipe.narrowing.hidden for recipe in recipes] == [0, 0, 0, 0.6]
    assert [bool(recipe.without) for recipe in recipes[1:]] == [False] * 3
    left = {task.__name__ for task in mixture_at(recipes[0], 0)}
    assert left and not any(name.startswith("competing") for name in left)
    same = [replace(r, price=0, without=(), narrowing=recipes[0].narrowing) for r in recipes]
    assert same == [same[0]] * 4


def test_tasks_are_left_out_by_name_and_unknown_names_refused():
    some = next(iter(MIXTURE)).__name__
    left = mixture_at(Recipe(without=(some,)), Recipe().steps)
    assert [task.__name__ for task in left] == [task.__name__ for task in MIXTURE][1:]
    with pytest.raises(ValueError, match=r"without=\['nonsense'\] are no tasks; there are .*bare"):
        mixture_at(Recipe(without=("nonsense",)), 0)


def test_the_card_shows_the_ablations_table(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"seed": 0, "log": []}))
    ablation.write_table(
        tmp_path / "ablation.csv",
        {
            "plain": [{"prompted": 1.0, "a, b": 0.5}, {"prompted": 1.0, "a, b": 0.0}],
            "priced": [{"prompted": 0.5, "a, b": 0.123}, {"prompted": 0.5, "a, b": float("nan")}],
        },
    )
    table = pd.read_csv(tmp_path / "ablation.csv").set_index(["model", "measure"])
    own = table.loc[("plain", "a, b")]
    assert (own["value"], own["low"], own["high"], own["concepts"]) == (0.25, 0.0, 0.5, 2)
    alone = table.loc[("priced", "a, b")]
    assert alone["concepts"] == 1 and alone["low"] != alone["low"]
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| what | plain | priced |" in card
    assert "| prompted | 1.00 | 0.50 |" in card and "| a, b | 0.25 | 0.12 |" in card


def test_the_mean_of_a_figure_leaves_out_concepts_without_one():
    found = measures.mean_measures([{"a": 1.0, "b": float("nan")}, {"a": 0.0, "b": 0.5}])
    assert found == {"a": 0.5, "b": 0.5}


def test_the_concepts_measured_are_spread_over_the_classes():
    chosen = measures.measured_concepts(GRAMMAR, 10)
    assert len({(c.concept_class, c.name) for c in chosen}) == 10
    assert {c.concept_class for c in chosen} == set(GRAMMAR.classes)
    assert all(len(c.questions) >= 3 for c in chosen)
