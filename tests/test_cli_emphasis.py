"""``lenskit emphasis``: its experiments are told their sizes, saved, and refuse what cannot be."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny
from commanded import lenskit

from lenskit import emphasis
from lenskit.cli.emphasis import TASK_EXPERIMENTS
from lenskit.study.experiments import Experiment


def test_the_commands_names_are_those_of_the_library():
    assert set(emphasis.EXPERIMENTS) == set(TASK_EXPERIMENTS)


def test_an_experiment_is_told_its_sizes_and_saved(tmp_path, monkeypatch):
    asked = {}

    def made(model, sizes, *, command, **options):
        asked.update(sizes=sizes, other=options["other"])
        row = {
            "task": "all",
            "way": "nothing",
            "measure": "profiled",
            "n": 3,
            "reference": "nothing",
        }
        ends = dict.fromkeys(
            ("low", "high", "difference", "difference_low", "difference_high"), 0.0
        )
        table = pd.DataFrame([{**row, **ends, "mean": 0.5}])
        about = {"group": "task", "counted": "n"}
        return Experiment("field", "What?", command, table, "nothing", **about)

    monkeypatch.setattr(emphasis, "EXPERIMENTS", {"field": made})
    folder, out = tiny.shared_folder(), tmp_path / "out"
    options = ("--model", folder, "--device", "cpu", "--prompts", 3, "--samples", 2, "--steps", 1)
    done = lenskit("emphasis", "field", *options, "--other", folder, "--out", out)
    assert done.exit_code == 0, done.output
    sizes = asked["sizes"]
    assert (sizes.number, sizes.samples, sizes.steps, sizes.seed) == (3, 2, 1, 0)
    assert asked["other"] is not None and pd.read_csv(out / "field.csv")["n"].tolist() == [3]
    said = f"lenskit emphasis field --model {folder} --other {folder}"
    assert f"`{said} --prompts 3 --samples 2 --steps 1`" in (out / "field.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["policy"], "is not one of policies, field"),
        (["heads", "--other", "nowhere"], "--other goes with field, not with heads"),
        (["field", "--samples", "0"], "samples"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    done = lenskit("emphasis", *arguments)
    assert done.exit_code == 1 and said in " ".join(done.output.split())
