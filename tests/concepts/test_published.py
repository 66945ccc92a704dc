"""Reading the published benchmark's layout, from folders written by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lenskit.concepts import Concept, load_concept_folder
from lenskit.prompts import build_prompts
from tests.tiny import shared_model

FIRST = ("Rain is better than sun.", "Libraries should open on Sundays.")
SECOND = ("Numbers are real.", "Maps are never finished.")


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def repository(root: Path) -> Path:
    """A small copy of the published layout."""
    write(root / "data/concepts/fears.txt", "Spiders", "Loud noises")
    write(root / "data/concepts/moods.txt", "Optimistic")
    write(root / "data/concepts/places.txt", "Tokyo", "Washington, D.C.")
    write(root / "data/concepts/personalities.txt", "Set Theorist")
    write(root / "data/concepts/personas.txt", "Ada Lovelace")
    write(root / "data/concepts/custom.txt", "Personify someone who likes MIT more than Harvard.")
    write(root / "data/concepts/jailbreaking.txt", "jailbreaking")
    write(root / "data/general_statements/class_0.txt", *FIRST)
    write(root / "data/general_statements/class_1.txt", *SECOND)
    write(
        root / "test_prompts.yaml",
        "fears:",
        "  2: And what comes second? Answer in 20",
        "    words or less.",
        "  1: What is scary?",
        "personalities:",
        "  1: What do you know?",
    )
    return root


@pytest.mark.parametrize("part", [".", "data"])
def test_the_published_layout_gives_five_classes_and_custom(tmp_path, part):
    read = load_concept_folder(repository(tmp_path) / part)
    assert set(read) == {"fears", "moods", "places", "experts", "personas", "custom"}
    assert (read.first, read.second) == (FIRST, SECOND)
    assert read.left_out == ("jailbreaking.txt",)
    prefixes = {name: next(iter(members.values())).prefix for name, members in read.items()}
    assert prefixes == {
        "fears": "Personify someone who is terrified of spiders.",
        "moods": "Take on a optimistic mood.",
        "places": "Personify someone who loves Tokyo.",
        "experts": "Take on the role of an expert set theorist.",
        "personas": "Take on the role of Ada Lovelace.",
        "custom": "Personify someone who likes MIT more than Harvard.",
    }


def test_questions_come_in_the_order_of_their_numbers(tmp_path):
    read = load_concept_folder(repository(tmp_path))
    expected = ("What is scary?", "And what comes second? Answer in 20 words or less.")
    assert read["fears"].questions == expected
    assert read["fears"]["spiders"] == Concept(
        "Personify someone who is terrified of spiders.", "spiders", "fears", expected
    )
    assert read["experts"]["set theorist"].questions == ("What do you know?",)
    assert read["moods"].questions == ()


def test_own_questions_replace_those_of_the_file(tmp_path):
    read = load_concept_folder(repository(tmp_path), questions={"topophiles": ["Where?"]})
    assert read["places"].questions == ("Where?",)
    assert read["fears"].questions == ()


def test_a_flat_folder_with_other_file_names_is_read(tmp_path):
    write(tmp_path / "Topophile.txt", "Tokyo", "", "  Paris ")
    write(tmp_path / "a.txt", *FIRST)
    write(tmp_path / "b.txt", *SECOND)
    read = load_concept_folder(tmp_path, statements=("a.txt", tmp_path / "b.txt"))
    assert list(read) == ["places"] and list(read["topophiles"]) == ["Tokyo", "Paris"]
    assert (read.first, read.second) == (FIRST, SECOND)
    assert read.left_out == ()


def test_further_classes_need_a_prefix_of_their_own(tmp_path):
    template = "Answer as somebody who collects {concept}."
    root = repository(tmp_path)
    write(root / "data/concepts/hobbies.txt", "Stamps {rare}")
    assert "hobbies.txt" in load_concept_folder(root).left_out
    read = load_concept_folder(root, prefixes={"hobbies": template})
    assert read["hobbies"]["Stamps {rare}"].prefix == (
        "Answer as somebody who collects Stamps {rare}."
    )
    write(root / "data/concepts/hobbies.txt", "Stamps", "Coins")
    with pytest.raises(ValueError, match="no {concept}"):
        load_concept_folder(root, prefixes={"hobbies": "Collect things."})


def test_an_unknown_class_is_answered_with_those_that_there_are(tmp_path):
    with pytest.raises(KeyError, match="'jailbreaking' is not among .*fears.*jailbreaking.txt"):
        load_concept_folder(repository(tmp_path))["jailbreaking"]


def test_byte_order_marks_and_windows_line_ends_do_not_matter(tmp_path):
    root = repository(tmp_path)
    (root / "data/concepts/fears.txt").write_bytes(b"\xef\xbb\xbfSpiders\r\nBeing alone\r\n\r\n")
    assert list(load_concept_folder(root)["fears"]) == ["spiders", "being alone"]


def test_duplicates_are_an_error_with_both_lines_or_dropped(tmp_path):
    root = repository(tmp_path)
    write(root / "data/concepts/fears.txt", "Spiders", "Dogs", "spiders")
    with pytest.raises(ValueError, match=r"fears.txt: line 3 repeats line 1, 'spiders'"):
        load_concept_folder(root)
    read = load_concept_folder(root, duplicates="drop")
    assert list(read["fears"]) == ["spiders", "dogs"]


def test_the_two_halves_must_not_share_a_statement(tmp_path):
    root = repository(tmp_path)
    write(root / "data/general_statements/class_1.txt", *SECOND, FIRST[0])
    with pytest.raises(ValueError, match="in class_0.txt too"):
        load_concept_folder(root)
    assert load_concept_folder(root, duplicates="drop").second == SECOND


@pytest.mark.parametrize("file", ["concepts/moods.txt", "general_statements/class_1.txt"])
def test_an_empty_file_is_named(tmp_path, file):
    root = repository(tmp_path)
    write(root / "data" / file, "  ", "")
    with pytest.raises(ValueError, match=f"{Path(file).name} is empty"):
        load_concept_folder(root)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_concept_folder(tmp_path / "nowhere")
    write(tmp_path / "fears.txt", "Spiders")
    with pytest.raises(FileNotFoundError, match="statements=.file with prefix"):
        load_concept_folder(tmp_path)
    (tmp_path / "fears.txt").unlink()
    write(tmp_path / "class_0.txt", *FIRST)
    write(tmp_path / "class_1.txt", *SECOND)
    with pytest.raises(ValueError, match="no file of concepts such as fears.txt"):
        load_concept_folder(tmp_path)


def test_prompts_put_the_prefix_before_the_first_file_only(tmp_path):
    root = repository(tmp_path)
    write(root / "data/general_statements/class_1.txt", *SECOND, "One too many.")
    read = load_concept_folder(root)
    prompts = build_prompts(
        shared_model(), read["fears"]["spiders"], statements=read.statements, seed=None
    )
    with_prefix = [s for s, p in zip(prompts.statements, prompts.has_prefix, strict=True) if p]
    assert tuple(with_prefix) == FIRST
    assert set(prompts.statements) == set(FIRST + SECOND)
