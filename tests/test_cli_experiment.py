"""``lenskit experiment`` on a model, concepts and a judge of one's own."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny
from commanded import OWN, lenskit

from lenskit import emphasis
from lenskit.cli.experiment import EMPHASIS, NAMES
from lenskit.study.experiments import EXPERIMENTS, Experiment


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def test_the_commands_names_are_those_of_the_library():
    assert set(EXPERIMENTS) == set(NAMES)
    assert set(emphasis.EXPERIMENTS) == set(EMPHASIS)


def test_an_experiment_runs_on_a_model_and_concepts_of_ones_own(own, tmp_path):
    out = tmp_path / "out"
    model = ("--model", tiny.shared_folder(), "--device", "cpu", "--concept-file", own)
    quick = ("--prompts", 8, "--coefficients", "0.5,2")
    done = lenskit("experiment", "tokens", *model, *quick, "--out", out)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out / "tokens.csv")
    assert {"token by attention", "unsteered"} <= set(table.way)
    assert "Which token should a concept be read from?" in done.stdout
    text = (out / "tokens.md").read_text()
    said = f"lenskit experiment tokens --model {tiny.shared_folder()} --concept-file {own}"
    assert f"`{said} --coefficients 0.5,2 --prompts 8`" in text


def test_an_experiment_on_emphasis_is_told_its_sizes_and_saved(tmp_path, monkeypatch):
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
    done = lenskit("experiment", "field", *options, "--other", folder, "--out", out)
    assert done.exit_code == 0, done.output
    sizes = asked["sizes"]
    assert (sizes.number, sizes.samples, sizes.steps, sizes.seed) == (3, 2, 1, 0)
    assert asked["other"] is not None and pd.read_csv(out / "field.csv")["n"].tolist() == [3]
    said = f"lenskit experiment field --model {folder} --prompts 3 --samples 2 --steps 1"
    assert f"`{said} --other {folder}`" in (out / "field.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["token"], "'token' is not one of tokens, labels"),
        (["tokens", "--workers", "2"], "--workers needs --out"),
        (["tokens", "--model", "nowhere"], "answers are judged by phrases"),
        (["tokens", "--coefficients", "0"], "above 0"),
        (["tokens", "--samples", "4"], "--samples is no option of 'tokens'"),
        (["emphasis", "--concepts", "4"], "--concepts is no option of 'emphasis'"),
        (["heads", "--other", "nowhere"], "--other is no option of 'heads'"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    refused = lenskit("experiment", *arguments)
    assert refused.exit_code == 1
    assert said in refused.stderr and refused.stderr.startswith("Error: ")


def test_a_saved_vector_is_diagnosed(own, tmp_path):
    model = ("--model", tiny.shared_folder(), "--device", "cpu")
    file = tmp_path / "tea.safetensors"
    made = lenskit("fit", file, *model, "--concept-file", own, "--concept", "tea")
    assert made.exit_code == 0, made.output
    done = lenskit("diagnose", file, *model, "--coefficient", "0.1", "--concept-file", own)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Diagnosis: ") and "because" in done.stdout
    refused = lenskit("diagnose", file, *model, "--blocks", "top2")
    assert refused.exit_code == 1 and "needs an enrichment test" in refused.stderr
