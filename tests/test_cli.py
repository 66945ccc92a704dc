"""The command ``lenskit``, run in this process on tiny models."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import tiny
from commanded import lenskit

import lenskit as lk
from lenskit.cli import app
from lenskit.concepts import (
    choose_concepts,
    number_wanted,
    read_blocks,
    read_numbers,
    read_shard,
    spread,
)
from lenskit.scoring import phrase_judge
from lenskit.study import Variant, demo, pools, run, run_study, score_table
from lenskit.study.engine import Here

THREE = ["fears/spiders", "moods/cheerful", "places/Paris"]


@pytest.fixture(scope="module")
def phrases(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("phrases") / "phrases.toml"
    file.write_text("spiders = ['a', 'e']\ncheerful = ['o']\nParis = ['i']\n")
    return file


@pytest.fixture(scope="module")
def small(phrases):
    """Arguments of a study that takes a second for each concept."""
    return (
        *("study", "--model", tiny.shared_folder(), "--phrases", phrases, "--device", "cpu"),
        *(word for name in THREE for word in ("--concepts", name)),
        *("--learner", "mean difference", "--labels", "hard", "--token", "-1"),
        *("--coefficients", "0.5,2", "--prompts", "12", "--no-controls"),
    )


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The folder of that study, run at one go."""
    folder = tmp_path_factory.mktemp("whole")
    done = lenskit(*small, "--out", folder)
    assert done.exit_code == 0, done.output
    return folder


def csv_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "answers.csv").read_bytes(), (folder / "summary.csv").read_bytes()


def test_a_study_writes_the_tables_of_its_answers_and_scores(whole):
    answers = pd.read_csv(whole / "answers.csv", keep_default_na=False)
    assert len(answers) == 3 * 2 * 5
    assert list(dict.fromkeys(answers["concept"])) == ["spiders", "cheerful", "Paris"]
    assert set(answers["token"].astype(str)) == {"-1"}
    assert sorted(set(answers["coefficient"])) == [0.5, 2.0]
    summary = pd.read_csv(whole / "summary.csv", keep_default_na=False)
    best = answers.groupby(["concept", "question"])["score"].max().mean()
    assert summary["best"].item() == pytest.approx(best)
    assert summary["concepts"].item() == 3


def test_a_study_that_was_stopped_goes_on_and_ends_the_same(small, whole, tmp_path, monkeypatch):
    done: list[str] = []
    steps = run.studied

    def stopped(settings, model, cells):
        if done:
            raise KeyboardInterrupt
        done.extend(concept.name for concept, _ in cells.values())
        return steps(settings, model, cells)

    small = (*small, "--batch-size", 10)  # the answers of one concept
    with monkeypatch.context() as patch:
        patch.setattr(run, "studied", stopped)
        first = lenskit(*small, "--out", tmp_path)
    assert first.exit_code == 130
    assert first.stderr == "Stopped. Run the same command again to go on.\n"
    assert done == ["spiders"] and not (tmp_path / "answers.csv").exists()

    again: list[str] = []

    def counted(settings, model, cells):
        again.extend(concept.name for concept, _ in cells.values())
        return steps(settings, model, cells)

    monkeypatch.setattr(run, "studied", counted)
    second = lenskit(*small, "--out", tmp_path)
    assert second.exit_code == 0, second.output
    assert again == ["cheerful", "Paris"]
    assert csv_of(tmp_path) == csv_of(whole)


def test_cells_that_fail_are_one_line_and_the_rest_is_kept(small, tmp_path, monkeypatch):
    def failing(settings, model, cells):
        raise ArithmeticError("no\nnumbers")

    monkeypatch.setattr(run, "studied", failing)
    done = lenskit(*small, "--out", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: 3 cells failed: ArithmeticError: no numbers (fears, ")
    assert len(done.stderr.splitlines()) == 1


def test_shards_share_a_folder_and_the_last_one_writes_the_tables(small, whole, tmp_path):
    first = lenskit(*small, "--out", tmp_path, "--shard", "0/2")
    assert first.exit_code == 0 and "1 of 3 concepts are still to be done" in first.stdout
    assert not (tmp_path / "answers.csv").exists()
    assert len(list(tmp_path.glob("cells-*.jsonl"))) == 1
    second = lenskit(*small, "--out", tmp_path, "--shard", "1/2")
    assert second.exit_code == 0, second.output
    assert csv_of(tmp_path) == csv_of(whole)


def test_a_folder_of_another_study_is_refused_in_one_line(small, whole):
    refused = lenskit(*small, "--out", whole, "--seed", 1)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: out=") and refused.stderr.count("\n") == 1
    assert "holds a study with other settings" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--class", "fear"], "'fear' is not a concept class; there are fears, moods"),
        (["--concepts", "fears/spider"], "'spider' is not among the 103 concepts"),
        (["--concepts", "spiders"], "'spiders' is neither a number nor a name"),
        (["--concepts", "0"], "a number from 1 on, all, or names, not 0"),
        (["--concepts", "3", "--concepts", "4"], "one number or names, not 3, 4"),
        (["--concepts", "fears/bees", "--class", "fears"], "--class goes with a number"),
        (["--token", "3"], "--token must be attention, each, look, or an offset such as -1"),
        (["--blocks", "best4"], "--blocks must be all, top4"),
        (["--coefficients", "0.1;0.2"], "must be different numbers like 0.1,0.2"),
        (["--coefficients", "0.1,0.1"], "must be different numbers"),
        (["--coefficients", "nan"], "must be different numbers"),
        (["--learner", "lasso"], "--learner 'lasso' is not one of rfm, ridge"),
        (["--labels", "firm"], "--labels 'firm' is not one of soft, hard"),
        (["--shard", "2/2", "--out", "x"], "--shard must be i/n with i from 0"),
        (["--shard", "0/2"], "--shard needs --out"),
        (["--model", "my-model"], "give --phrases FILE"),
        (["--phrases", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_work(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = lenskit("study", *arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1
    assert said in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spiders = ['web']", "gives nothing for 'bees'"),
        ("bees = 'buzz'", "gives 'buzz' for 'bees'"),
        ("bees = []", "gives [] for 'bees'"),
        ("bees: buzz", "is not TOML"),
    ],
)
def test_a_file_without_the_phrases_that_are_needed_is_refused(text, said, tmp_path):
    file = tmp_path / "phrases.toml"
    file.write_text(text)
    refused = lenskit("study", "--model", "x", "--concepts", "fears/bees", "--phrases", file)
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert said in refused.stderr


def test_a_model_that_is_not_there_is_one_line(phrases, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ("--phrases", phrases, "--concepts", "fears/spiders")
    refused = lenskit("study", "--model", tmp_path / "nothing", *arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1


def test_the_traceback_of_a_mistake_can_be_asked_for():
    refused = lenskit("--traceback", "study", "--class", "fear")
    assert isinstance(refused.exception, KeyError)


def test_concepts_lists_the_classes_and_the_members_of_one():
    every = lenskit("concepts").stdout
    assert all(f"{name} ({len(lk.concepts[name])})" in every for name in lk.concepts)
    assert all(concept in lenskit("concepts", "moods").stdout for concept in lk.concepts["moods"])
    assert lenskit("concepts", "mood").exit_code == 1


def test_the_version_is_that_of_the_package():
    assert lenskit("version").stdout == f"lenskit {lk.__version__}\n"


def test_without_a_command_the_help_is_shown():
    shown = lenskit()
    assert all(name in shown.output for name in ("demo", "study", "concepts", "version"))


def test_python_dash_m_runs_the_same_command():
    assert import_module("lenskit.__main__").app is app


def test_concepts_are_spread_evenly_over_a_class():
    members = list(lk.concepts["fears"].values())
    assert spread("fears", None) == members
    assert spread("fears", 2) == [members[0], members[len(members) // 2]]
    chosen = choose_concepts(["12"])
    assert len(set(chosen)) == 60
    assert choose_concepts(["3"], ["moods", "moods"]) == spread("moods", 3)
    assert len(choose_concepts(["all"])) == 512
    with pytest.raises(ValueError, match="1 to 103 concepts to choose, not 200"):
        choose_concepts(["200"])


def test_a_number_of_concepts_is_told_from_their_names():
    assert [number_wanted(which) for which in (["3"], ["all"], ["fears/spiders"])] == [3, 0, None]
    with pytest.raises(ValueError, match="from 1 on, all, or names, not -3"):
        number_wanted(["-3"])


def test_shards_numbers_and_blocks_are_read():
    items = list(range(7))
    assert [items[read_shard(f"{i}/3")] for i in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert read_numbers("-1,0.5,2e-1") == (-1.0, 0.5, 0.2)
    assert read_blocks(["all", "4,5", "all"]) == ("all", "4,5")


class InThisProcess(Here):
    """Instead of processes, which would load the model anew."""

    def __init__(self, load, compute, size, devices=None):
        super().__init__(load, compute)


@pytest.fixture
def small_demo(monkeypatch):
    """The demonstration on a tiny model, with few prompts and short answers."""
    model = tiny.shared_model()
    judge = phrase_judge(["a", "e"])
    settings = {
        **demo.OPTIONS,
        "judge": judge,
        "coefficients": (0.5, 2.0),
        "prompts": 40,
        "max_new_tokens": 4,
    }
    for name, value in {
        "COEFFICIENTS": (0.5, 2.0),
        "PROMPTS": 40,
        "OPTIONS": settings,
        "Processes": InThisProcess,
        "load_model": lambda *_, **__: model,
    }.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(pools, "Processes", InThisProcess)


@pytest.mark.slow
def test_the_demo_prints_its_table_and_writes_its_pictures(small_demo, tmp_path):
    arguments = ("--concepts", 1, "--work", tmp_path / "work", "--out", tmp_path / "figures")
    done = lenskit("demo", *arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "steerability_by_token.png",
        "steerability_by_labels.png",
        "steerability_by_class.png",
        "selected_tokens.png",
        "enrichment_by_block.png",
        "demo.json",
    }
    for word in ("attention", "-5", "ridge", "unsteered", "prompted", "random vector"):
        assert word in done.stdout
    numbers = json.loads((tmp_path / "figures" / "demo.json").read_text())
    assert numbers["concepts"] == 5 and len(numbers["variants"]) == len(demo.VARIANTS)
    assert len(numbers["by class"]) == 5 * len(demo.VARIANTS)
    assert set(numbers["enrichment"]) == {"keys", "windows", "paired"}

    # What is finished is not run again.
    again = lenskit("demo", *arguments[:-1], tmp_path / "again")
    assert again.exit_code == 0, again.output
    written = (tmp_path / "again" / "demo.json").read_text()
    assert json.loads(written) == numbers


def test_the_demo_selects_the_tokens_that_its_study_used(small_demo, tmp_path):
    concept = lk.concepts["moods"]["cheerful"]
    model = tiny.shared_model()
    found = demo._selected(lambda: model, [concept], tmp_path / "tokens", "m:1", 2)
    offsets = found["moods", "cheerful"]
    seen = lk.capture(model, lk.build_prompts(model, concept, number=40), progress=False)
    assert offsets == lk.select_tokens(seen).offsets.tolist()
    kept = run_study(model, [concept], demo.VARIANTS, progress=False, **demo.OPTIONS)
    assert len(kept.answers) == (len(demo.VARIANTS) - 2) * 2 * 5 + 2 * 5


def test_the_table_of_scores_names_controls_and_leaves_out_what_never_varies():
    table = pd.DataFrame(
        [vars(Variant()), vars(Variant(token="-1")), vars(Variant(control="prompted"))]
    )
    table = table.assign(
        **{"best": 0.5, "held_out": 0.25, "best ±": 0.01, "held_out ±": float("nan"), "concepts": 1}
    )
    shown = score_table(table)
    assert [column.header for column in shown.columns] == ["token", "best", "held out"]
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["attention", "-1", "prompted"]
    assert cells[1] == ["50.0 ± 1.0"] * 3 and cells[2] == ["25.0"] * 3
