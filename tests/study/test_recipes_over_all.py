"""The benchmark of recipes over all concepts: what it makes of the times that studies told."""

from __future__ import annotations

import json

import pytest

from benchmarks.recipes import DISPLACEMENTS, MINUTES, NORMS, spent


def test_minutes_stand_beside_those_asked_and_stages_share_the_workers_time(tmp_path):
    assert len(spent(tmp_path, 5)) == 0
    told = {"recipe": "lenskit", "whole": 120.0, "workers": 2, "capture": 60.0, "answers": 180.0}
    (tmp_path / "times.json").write_text(json.dumps({"lenskit": told}))
    (row,) = spent(tmp_path, 512).to_dict("records")
    assert row["minutes"] == 2 and row["asked"] == MINUTES["lenskit"] == 6
    assert (row["capture"], row["answers"]) == pytest.approx((0.25, 0.75))


def test_both_budgets_are_ten_coefficients():
    assert len(DISPLACEMENTS) == len(NORMS) == 10
