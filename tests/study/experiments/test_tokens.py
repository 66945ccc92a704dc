from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import tiny
from experimented import CONCEPTS, OPTIONS, ByTheText, run

from lenskit.capture import capture
from lenskit.generation import generate
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.steering import steer
from lenskit.study import CellsFailed
from lenskit.study.divergence import divergence, unsteered
from lenskit.study.experiments import tokens
from lenskit.vectors import fit_vectors


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tokens, out=tmp_path_factory.mktemp("tokens"))


def vectors_of(model, concept, token):
    prompts = build_prompts(model, concept, number=24, statements=OPTIONS["statements"])
    return fit_vectors(capture(model, prompts, progress=False), token, progress=False)


def test_answers_equal_those_of_the_steps_taken_one_by_one(found):
    model = tiny.shared_model()
    rows = found.answers
    for way, token in (
        ("token by attention", "attention"),
        ("token -2", "-2"),
        ("each closing token its own vector, one block", "each"),
    ):
        for concept in CONCEPTS:
            vectors = vectors_of(model, concept, token)
            own = rows[(rows.way == way) & (rows.concept == concept.name) & ~rows.calibrated]
            assert sorted(set(own.coefficient)) == [0.5, 2.0]
            blocks = [int(own.chosen.iloc[0][-1])] if token == "each" else None
            for coefficient, part in own.groupby("coefficient"):
                number = len(blocks or range(3))
                with steer(model, vectors, coefficient=coefficient / number, blocks=blocks):
                    expected = generate(model, list(part.question), max_new_tokens=5)
                assert list(part.answer) == expected


def test_every_way_is_scaled_to_the_same_divergence(found):
    model, concept = tiny.shared_model(), CONCEPTS[0]
    base = unsteered(model, OPTIONS["questions"])
    own = found.answers.query("way == 'token -1' and concept == 'cheerful' and calibrated")
    (coefficient,), (reached,) = set(own.coefficient), set(own.divergence)
    assert reached == pytest.approx(0.5, rel=0.05)
    vectors = vectors_of(model, concept, "-1")
    again = divergence(model, base, [vectors], [coefficient / 3], relative=True)
    assert float(again[0]) == pytest.approx(reached, rel=1e-3)


def test_controls_stand_beside_the_ways_and_another_concepts_vector_is_its_own(found):
    controls = found.answers[found.answers["control"] != ""]
    assert list(dict.fromkeys(controls["control"])) == [
        *("unsteered", "prompted", "random vector", "shuffled labels", "another concept's vector")
    ]
    model = tiny.shared_model()
    own = found.answers.query(
        "control == \"another concept's vector\" and concept == 'spiders' and coefficient == 2.0"
    )
    with steer(model, vectors_of(model, CONCEPTS[0], "attention"), coefficient=2.0 / 3):
        assert list(own.answer) == generate(model, list(own.question), max_new_tokens=5)


def test_the_table_has_every_way_measure_and_class(found):
    assert set(found.table.concept_class) == {"all", "moods", "fears"}
    assert found.measures == [
        *("best", "held out", "one coefficient", "same divergence", "steerable")
    ]
    own = found.table[(found.table.way == "token -1") & (found.table.concept_class == "all")]
    rows = found.parts["by concept"].query("way == 'token -1'")
    assert own.set_index("measure").loc["held out", "mean"] == pytest.approx(
        rows["held out"].mean()
    )
    assert found.reference == "token by attention"
    assert "token -1, one block" in set(found.table.way)
    assert "more in .wide()" in repr(found) and len(repr(found).splitlines()) <= 15


def test_it_is_saved_with_the_command_that_made_it(found, tmp_path):
    written = {path.name for path in found.save(tmp_path)}
    assert {"tokens.csv", "tokens.md", "tokens-answers.csv", "tokens-by-concept.csv"} <= written
    text = (tmp_path / "tokens.md").read_text()
    assert "`lk.experiments.tokens(model, 2 concepts)`" in text and "| token -1 |" in text
    assert len(pd.read_csv(tmp_path / "tokens.csv")) == len(found.table)


def test_it_goes_on_from_its_folder_and_refuses_another_setting(tmp_path, monkeypatch):
    first = run(tokens, CONCEPTS[:1], out=tmp_path)
    files = sorted((tmp_path / "cells" / "tokens").glob("cells-*.jsonl"))
    again = run(tokens, CONCEPTS[:1], out=tmp_path)
    pd.testing.assert_frame_equal(first.table, again.table)
    assert sorted((tmp_path / "cells" / "tokens").glob("cells-*.jsonl")) == files
    with pytest.raises(ValueError, match="other settings"):
        run(tokens, CONCEPTS[:1], out=tmp_path, seed=1)


def test_one_concept_has_no_other_and_no_block_chosen_elsewhere():
    found = run(tokens, CONCEPTS[0])
    assert "another concept's vector" not in set(found.table.way)
    assert not [way for way in set(found.table.way) if way.endswith("one block")]


def test_a_fault_is_no_result_and_the_rest_is_kept(tmp_path):
    class Falls(ByTheText):
        def __call__(self, concept, question, answer):
            if concept.name == "spiders":
                raise RuntimeError("no verdict")
            return super().__call__(concept, question, answer)

    with pytest.raises(CellsFailed, match="no verdict"):
        run(tokens, judge=Falls(), out=tmp_path)
    found = run(tokens, CONCEPTS[:1], judge=Falls(), out=tmp_path)
    assert len(found.table)


def test_options_that_cannot_be_meant_are_named():
    for options, error, words in (
        ({"coefficients": (0.5, 0.5)}, ValueError, "coefficients must differ"),
        ({"coefficients": (-1.0,)}, ValueError, "above 0"),
        ({"coefficient": 1.0}, TypeError, "no option coefficient"),
        ({"prompts": 2}, ValueError, "prompts must be 8 or more"),
        ({"judge": 3}, TypeError, "judge must be callable"),
        ({"questions": "Why?"}, ValueError, "questions is one text"),
        ({"workers": 2}, ValueError, "give a function that loads it"),
    ):
        with pytest.raises(error, match=words):
            run(tokens, **options)


@pytest.mark.slow
def test_workers_find_the_same_as_one_process(found):
    load = partial(load_model, tiny.shared_folder(), device="cpu", check=False)
    options = OPTIONS | {"judge": ByTheText(), "workers": 2}
    again = tokens(load, CONCEPTS, **options)
    pd.testing.assert_frame_equal(again.table, found.table)
