"""The main comparison's own parts: which block is steered alone, and the table."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.comparison import VARIANTS, best_block, in_block, markdown, one_block, others
from lenskit.concepts import concepts, spread
from lenskit.study import Study, Variant


def study(scores: dict[Variant, tuple[float, ...]]) -> Study:
    """Scores of three questions at one coefficient, the same for two concepts."""
    rows = [
        {"concept_class": "fears", "concept": name}
        | vars(variant)
        | {"coefficient": 1.0, "question": f"question {i}", "score": score}
        for variant, own in scores.items()
        for name in ("spiders", "rats")
        for i, score in enumerate(own)
    ]
    return Study(pd.DataFrame(rows))


def test_the_block_is_chosen_on_concepts_that_are_not_compared():
    chosen = others(21, 2)
    compared = [one for name in concepts for one in spread(name, 21)]
    assert len(chosen) == 2 * len(concepts) and not [one for one in chosen if one in compared]
    with pytest.raises(ValueError, match="concepts beside the"):
        others(len(next(iter(concepts.values()))), 2)


def test_the_best_block_of_each_token_is_that_with_the_highest_held_out_score():
    found = study(
        {
            in_block("each", 0): (0, 0, 0),
            in_block("each", 1): (1, 1, 0),
            in_block("each", 2): (1, 1, 0),
            in_block("attention", 0): (1, 0, 0),
            in_block("attention", 1): (0, 0, 0),
        }
    )
    assert (best_block(found, "each"), best_block(found, "attention")) == (1, 0)


def test_every_way_is_a_row_of_its_own_and_says_its_block():
    ways = one_block({"each": 1, "attention": 3})
    assert {(way.token, way.blocks) for way in ways} == {("each", "1"), ("attention", "3")}
    assert not set(ways) & set(VARIANTS)
    labels = {way.labels for way in VARIANTS}
    assert {"gating", "true activity"} <= labels & {way.labels for way in ways}
    still = Variant(control="unsteered")
    table = markdown(study(dict.fromkeys((VARIANTS[0], still, *ways), (1, 0, 1))), "head")
    assert "| each | 1 | gating | covariance |" in table
    assert "| control: random vector, token each | 1 | hard | covariance |" in table
    assert "| control: unsteered |  |  |  |" in table
    assert len({line for line in table.splitlines() if line.startswith("|")}) == 4 + len(ways)
