from __future__ import annotations

import pytest
from experimented import CONCEPTS, run

from lenskit.study.experiments import loop
from lenskit.study.experiments.loop import LOOPS

BUDGET = (0.3, 0.9)


@pytest.fixture(scope="module")
def found():
    return run(loop, CONCEPTS, coefficients=BUDGET)


def test_every_loop_stands_beside_steering_always_with_its_price(found):
    wide = found.wide()
    assert list(wide.index[: len(LOOPS)]) == list(LOOPS)
    assert {"unsteered", "prefix in the prompt"} <= set(wide.index)
    assert wide.loc["always", "strength"] == 1 and wide.loc["unsteered", "strength"] == 0
    for name in ("below the band", "in proportion", "where plausible"):
        assert 0 <= wide.loc[name, "strength"] <= 1
    assert wide.loc["prefix in the prompt", "less fluent"] == pytest.approx(0, abs=1e-6)


def test_every_coefficient_of_the_budget_was_tried(found):
    means = found.parts["by coefficient"]
    tried = means[means.way == "always"]["coefficient"].tolist()
    assert tried == list(BUDGET) and found.reference == "always"


def test_a_single_concept_has_no_others_to_choose_on():
    with pytest.raises(ValueError, match="give two or more"):
        run(loop, CONCEPTS[0])
    with pytest.raises(ValueError, match="are not known; there are always"):
        run(loop, CONCEPTS, loops=["never"])
