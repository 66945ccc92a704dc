from __future__ import annotations

from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lenskit.study import Study, Variant, paired_differences, score_table

FIRST, SECOND, NOTHING = Variant(), Variant(labels="hard"), Variant(control="unsteered")


def study(shares: dict[Variant, list[float]]) -> Study:
    """One coefficient and ten questions, of which each concept answers a share."""
    rows = [
        {"concept_class": "own", "concept": str(concept), **vars(variant), "coefficient": 0.1}
        | {"question": f"{question}", "answer": "…", "score": int(question < round(10 * share))}
        | {"reason": ""}
        for variant, own in shares.items()
        for concept, share in enumerate(own)
        for question in range(10)
    ]
    return Study(pd.DataFrame(rows))


def test_differences_are_taken_concept_by_concept():
    # Concepts differ greatly, and the second variant is better by a tenth for each of them.
    low = [0.0, 0.2, 0.5, 0.9]
    found = paired_differences(study({FIRST: low, SECOND: [x + 0.1 for x in low]}))
    assert np.allclose(found["difference"], [0, 0.1])
    assert np.allclose(found[["low", "high"]], [[0, 0], [0.1, 0.1]])
    assert found["concepts"].tolist() == [4, 4]
    assert found["steerable"].tolist() == [0.75, 1.0]


def test_the_interval_is_that_of_the_mean_over_concepts():
    values = np.random.default_rng(1).integers(0, 11, 200) / 10
    shares = study({FIRST: [0.0] * 200, SECOND: values.tolist()})
    row = paired_differences(shares).iloc[1]
    half = 1.96 * values.std() / np.sqrt(200)
    assert row["low"] == pytest.approx(values.mean() - half, abs=0.01)
    assert row["high"] == pytest.approx(values.mean() + half, abs=0.01)
    narrow = paired_differences(shares, level=0.5).iloc[1]
    assert row["low"] < narrow["low"] < narrow["high"] < row["high"]


def test_the_same_seed_gives_the_same_interval():
    shares = study({FIRST: [0.1, 0.4, 0.2], SECOND: [0.3, 0.3, 0.9]})
    assert paired_differences(shares).equals(paired_differences(shares))
    assert not paired_differences(shares).equals(paired_differences(shares, seed=1, draws=50))


def test_a_variant_that_is_not_in_the_study_is_named():
    with pytest.raises(ValueError, match="prompted.*not in the study"):
        paired_differences(study({FIRST: [0.5]}), Variant(control="prompted"))


def test_one_concept_has_no_interval():
    found = paired_differences(study({FIRST: [0.5], NOTHING: [0.0]}), NOTHING)
    assert found["difference"].tolist() == [0.5, 0.0]
    assert found[["low", "high"]].isna().all(axis=None)


def test_the_table_for_the_terminal_shows_differences_and_the_share_of_steerable_concepts():
    shares = study({FIRST: [0.0, 0.2, 0.5], SECOND: [0.1, 0.3, 0.6], NOTHING: [0, 0, 0]})
    out = StringIO()
    Console(file=out, width=120).print(score_table(shares.compare(), paired_differences(shares)))
    hard = next(line for line in out.getvalue().splitlines() if "hard" in line)
    assert "+10.0 [+10.0, +10.0]" in hard and "100 %" in hard
