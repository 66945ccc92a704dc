"""Scores of ways, against the same figures taken by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lenskit.study.experiments.scores import by_concept, chosen_elsewhere, summary

QUESTIONS = ("a", "b", "c")


def answers(scores: dict, calibrated: dict | None = None) -> pd.DataFrame:
    """Rows from {way: {concept: {coefficient: (scores of three questions)}}}."""
    rows = []
    for table, scaled in ((scores, False), (calibrated or {}, True)):
        for way, concepts in table.items():
            for concept, by_coefficient in concepts.items():
                for coefficient, own in by_coefficient.items():
                    for question, score in zip(QUESTIONS, own, strict=True):
                        rows.append(
                            {"concept_class": concept[0], "concept": concept, "way": way}
                            | {"control": "", "coefficient": coefficient, "question": question}
                            | {"answer": "", "score": float(score), "reason": ""}
                            | {"calibrated": scaled or coefficient == 0, "divergence": None}
                        )
    return pd.DataFrame(rows)


def test_the_four_scores_are_those_taken_by_hand():
    found = by_concept(
        answers(
            {
                "one": {
                    "x1": {0.1: (1, 0, 0), 0.2: (0, 1, 1)},
                    "x2": {0.1: (0, 0, 0), 0.2: (1, 1, 0)},
                    "y1": {0.1: (1, 1, 1), 0.2: (0, 0, 0)},
                },
                "still": {"x1": {0.0: (0, 1, 0)}, "x2": {0.0: (0, 0, 0)}},
            },
            {"one": {"x1": {0.17: (1, 1, 0)}, "y1": {0.1: (0, 0, 0)}}},
        )
    ).set_index(["way", "concept"])
    own = found.loc[("one", "x1")]
    assert own["best"] == 1.0 and own["coefficient"] == 0.2 and own["calibrated"] == 0.17
    # Chosen on (a, b): 0.1 of equal ones, which c scores 0; on (a, c) the same; on (b, c): 0.2.
    assert own["held out"] == pytest.approx(0.0)
    # x2 and y1 together: 0.1 has (0 + 3) / 6 and 0.2 (2 + 0) / 6.
    assert own["one coefficient"] == pytest.approx(1 / 3)
    assert own["same divergence"] == pytest.approx(2 / 3)
    assert np.isnan(found.loc[("one", "x2"), "same divergence"])
    assert found.loc[("one", "y1"), "one coefficient"] == pytest.approx(0.0)
    still = found.loc[("still", "x1")]
    for score in ("best", "held out", "one coefficient", "same divergence"):
        assert still[score] == pytest.approx(1 / 3)
    assert found.loc[("still", "x2"), "steerable"] == 0


def test_one_coefficient_needs_another_concept():
    found = by_concept(answers({"one": {"x1": {0.1: (1, 0, 0), 0.2: (0, 1, 1)}}}))
    assert np.isnan(found["one coefficient"]).all()


def test_differences_are_paired_over_the_concepts_that_both_have():
    rows = pd.DataFrame(
        [
            {"concept_class": c[0], "concept": c, "way": way, "score": value}
            for way, values in {
                "first": {"x1": 0.0, "x2": 0.5, "y1": 0.5},
                "second": {"x1": 1.0, "x2": 1.0},
            }.items()
            for c, value in values.items()
        ]
    )
    found = summary(rows, ["score"]).set_index(["concept_class", "way"])
    assert found.loc[("all", "second"), "difference"] == pytest.approx(0.75)
    assert found.loc[("all", "second"), "concepts"] == 2
    assert found.loc[("all", "first"), "difference"] == 0
    low, high = found.loc[("all", "second"), ["difference_low", "difference_high"]]
    assert 0.5 <= low <= 0.75 <= high <= 1.0
    assert np.isnan(found.loc[("y", "first"), "low"])
    assert ("y", "second") not in found.index


def test_what_is_chosen_is_chosen_on_other_concepts():
    table = answers(
        {
            "block 0": {"x1": {0.1: (1, 1, 1)}, "x2": {0.1: (0, 0, 0)}, "y1": {0.1: (0, 0, 0)}},
            "block 1": {"x1": {0.1: (0, 0, 0)}, "x2": {0.1: (0, 0, 0)}, "y1": {0.1: (1, 1, 1)}},
        }
    )
    found = chosen_elsewhere(table, {"one block": ["block 0", "block 1"]})
    chosen = found.groupby("concept")["chosen"].first().to_dict()
    assert chosen == {"x1": "block 1", "x2": "block 0", "y1": "block 0"}
    assert set(found["way"]) == {"one block"} and len(found) == 9
    alone = chosen_elsewhere(table[table["concept"] == "x1"], {"one block": ["block 0"]})
    assert not len(alone)
