"""``lenskit experiment`` on a model, concepts and a judge of one's own."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny
from commanded import OWN, lenskit

from lenskit.cli.experiment import NAMES
from lenskit.study.experiments import EXPERIMENTS


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def test_the_commands_names_are_those_of_the_library():
    assert {*EXPERIMENTS, "sizes", "beyond-text"} == {*NAMES}


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


def test_sizes_takes_folders_of_models_and_draws_from_its_tables(own, tmp_path):
    out = tmp_path / "out"
    quick = ("--prompts", 8, "--coefficients", "2", "--concepts", "tea", "--device", "cpu")
    folder = tiny.shared_folder()
    done = lenskit(
        *("experiment", "sizes", "--folder", folder, "--concept-file", own, *quick, "--out", out)
    )
    assert done.exit_code == 0, done.output
    blocks = pd.read_csv(out / "sizes-by-block.csv")
    assert set(blocks.model) == {folder.name} and set(blocks.block) == {0, 1, 2}
    said = f"lenskit experiment sizes --folder {folder} --concept-file {own} --concepts tea"
    assert said in (out / "sizes.md").read_text()
    done = lenskit("figures", "--results", out, "--out", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figures" / "sizes.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["token"], "'token' is not one of tokens, labels"),
        (["tokens", "--workers", "2"], "--workers needs --out"),
        (["tokens", "--model", "nowhere"], "answers are judged by phrases"),
        (["tokens", "--coefficients", "0"], "above 0"),
        (["tokens", "--folder", "nowhere"], "--folder goes with the experiment sizes"),
        (["sizes", "--model", "nowhere"], "which has --folder"),
        (["sizes", "--folder", "nowhere"], "neither a model's folder"),
        (["beyond-text", "--model", "nowhere"], "which trains one of its own"),
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
