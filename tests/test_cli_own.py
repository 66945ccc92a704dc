"""Concepts of one's own and saved vectors from the command line; output that any terminal takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny
from commanded import OWN, lenskit

import lenskit as lk
from lenskit.cli.steer import _visible

QUESTIONS = ("Who?", "Why?", "Where to?")


def in_a_terminal(*arguments: object, code: str = "", **options):
    """The command in a process of its own, whose terminal knows ASCII alone."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    start = f"{code}\nfrom lenskit.__main__ import app; app(prog_name='lenskit')"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("own") / "own.toml"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def model() -> tuple:
    return "--model", tiny.shared_folder(), "--device", "cpu"


def quick(*more: object) -> tuple:
    return "--prompts", 8, "--coefficients", "0.5,2", "--no-controls", *more


def test_a_study_takes_its_concepts_questions_and_phrases_from_one_file(own, model, tmp_path):
    done = lenskit("study", *model, "--concept-file", own, *quick("--out", tmp_path))
    assert done.exit_code == 0, done.output
    answers = pd.read_csv(tmp_path / "answers.csv", keep_default_na=False)
    assert list(dict.fromkeys(answers.concept)) == ["tea", "milk"]
    assert set(answers.question) == set(QUESTIONS)
    tea = answers[(answers.concept == "tea") & ~answers.reason.isin(["repeating", "unfinished"])]
    words = tea.answer.str.lower().str.findall(r"\w+")
    assert [bool({"a", "e", "i"} & set(w)) for w in words] == list(tea.score.astype(bool))
    assert set(answers.labels) == {"soft"} and set(answers.learner) == {"covariance"}


def test_some_concepts_of_a_file_can_be_named(own, model):
    done = lenskit("study", *model, "--concept-file", own, "--concepts", "milk", *quick())
    assert done.exit_code == 0, done.output
    assert "(1 concepts)" in " ".join(done.stdout.split())


def test_a_single_concept_is_a_prefix_with_questions_and_phrases(model, tmp_path):
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    said = ("--prefix", "Take on a tea mood.", *asked, "--phrase", "tea", "--phrase", "a")
    done = lenskit("study", *model, *said, *quick("--out", tmp_path))
    assert done.exit_code == 0, done.output
    answers = pd.read_csv(tmp_path / "answers.csv", keep_default_na=False)
    assert set(answers.concept) == {"custom"} and len(answers) == 6


def test_the_papers_recipe_is_one_option(own, model, tmp_path):
    chosen = ("--concept-file", own, "--concepts", "tea", "--recipe", "paper")
    done = lenskit("study", *model, *chosen, *quick("--out", tmp_path))
    assert done.exit_code == 0, done.output
    answers = pd.read_csv(tmp_path / "answers.csv", keep_default_na=False)
    kinds = answers[["labels", "learner", "blocks"]].drop_duplicates().values.tolist()
    assert kinds == [["soft", "rfm", "from1"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "--prefix", "Be shy.", "--question", "Who?"], "--prefix needs --phrase"),
        (["study", "--prefix", "Be shy.", "--class", "fears"], "--prefix is one concept"),
        (["study", "--question", "Who?"], "go with --prefix"),
        (["study", "--concept-file", "nowhere.toml"], "nowhere.toml"),
        (["study", "--recipe", "papre"], "did you mean 'paper'"),
        (["fit", "x.safetensors"], "say which concept"),
        (["fit", "no/x.safetensors", "--concept", "fears/spiders"], "no is not a folder"),
        (["fit", "x.safetensors", "--concept", "fears/spider"], "'spider' is not among"),
        (["fit", "x.safetensors", "--concept", "3"], "--concept says which of 15"),
        (["fit", "x.st", "--concept", "fears/bees", "--learner", "rmf"], "'rmf' is not one of"),
        (["steer", "nowhere.safetensors"], "nowhere.safetensors"),
        (["steer", "x", "--absolute"], "--absolute needs --coefficients"),
        (["steer", "x", "--blocks", "top4"], "needs an enrichment test"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = lenskit(*arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1
    assert said in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def vectors(own, model, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("vectors") / "tea.safetensors"
    chosen = ("--concept-file", own, "--concept", "tea", "--learner", "ridge")
    done = lenskit("fit", file, *model, *chosen)
    assert done.exit_code == 0, done.output
    assert f"wrote {file}" in done.stdout.replace("\n", "")
    return file


def test_fitted_vectors_are_those_of_the_steps_and_keep_their_concept(vectors, own):
    file, model = lk.load_concept_file(own), tiny.shared_model()
    prompts = lk.build_prompts(model, file["tea"], statements=file.statements)
    capture = lk.capture(model, prompts, progress=False)
    expected = lk.fit_vectors(capture, learner="ridge", progress=False)
    found = lk.ConceptVectors.load(vectors, model)
    assert found.directions.allclose(expected.directions)
    assert found.concept == file["tea"] and found.labels == "soft"


def test_steering_prints_unsteered_beside_steered_answers(vectors, model):
    tiny_model = tiny.shared_model()
    found = lk.ConceptVectors.load(vectors)
    options = ("--coefficients", "0.5,-3", "--max-new-tokens", 5, "--blocks", "from1")
    shown = lenskit("steer", vectors, *model, "--question", "Who?", *options)
    assert shown.exit_code == 0, shown.output
    text = "".join(shown.stdout.split())
    unsteered = lk.generate(tiny_model, "Who?", max_new_tokens=5)
    expected = [("unsteered", unsteered)]
    for coefficient in (0.5, -3.0):
        with lk.steer(tiny_model, found, coefficient=coefficient, blocks=(1, 2)):
            answer = lk.generate(tiny_model, "Who?", max_new_tokens=5)
        expected.append((f"{coefficient:g}", answer))
    place = text.index("Who?")
    for name, answer in expected:
        place = text.index(name, place)
        assert "".join(_visible(answer).split()) in text[place:]


def test_vectors_of_another_model_are_refused(vectors):
    refused = lenskit("steer", vectors, "--model", tiny.shared_folder("llama"))
    assert refused.exit_code == 1 and "were made with model" in refused.stderr


def test_what_a_model_writes_cannot_command_the_terminal():
    assert _visible("red \x1b[31m and\r\nnew") == "red \\x1b[31m and\\r\\nnew"


FAST = "import torch; torch.set_num_threads(1)"


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_gets_the_whole_table(own, model, tmp_path):
    chosen = ("study", *model, "--concept-file", own, *quick("--out", tmp_path))
    done = in_a_terminal(*chosen, code=FAST, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"+/-" in done.stdout and b"wrote" in done.stdout and done.stdout.isascii()
    assert (tmp_path / "answers.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_device_or_a_closed_pipe_loses_no_answers(own, model, tmp_path):
    chosen = ("study", *model, "--concept-file", own, "--concepts", "tea")
    with open("/dev/full", "wb") as full:
        done = in_a_terminal(*chosen, *quick("--out", tmp_path / "full"), code=FAST, stdout=full)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: ")
    assert done.stderr.count(b"\n") == 1 and b"No space" in done.stderr
    assert (tmp_path / "full" / "answers.csv").stat().st_size > 100

    read, write = os.pipe()
    os.close(read)
    done = in_a_terminal(*chosen, *quick("--out", tmp_path / "pipe"), code=FAST, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "pipe" / "answers.csv").stat().st_size > 100


def test_a_recipe_that_looks_first_fits_and_steers_and_says_what_it_chose(own, model, tmp_path):
    file = tmp_path / "looked.safetensors"
    chosen = ("--concept-file", own, "--concept", "tea", "--recipe", "lenskit")
    done = lenskit("fit", file, *model, *chosen)
    assert done.exit_code == 0, done.output
    assert "looked: " in done.stdout
    found = lk.ConceptVectors.load(file)
    assert found.displacement is not None
    shown = lenskit("steer", file, *model, "--question", "Why?", "--max-new-tokens", 3)
    assert shown.exit_code == 0, shown.output
    assert "displacements" in shown.stdout and "2.5" in shown.stdout
    again = lenskit(
        "steer", file, *model, "--question", "Why?", "--max-new-tokens", 3, "--recipe", "lenskit"
    )
    assert again.stdout == shown.stdout
    refused = lenskit("steer", file, *model, "--recipe", "default")
    assert refused.exit_code == 1 and "in units of displacement" in refused.stderr
