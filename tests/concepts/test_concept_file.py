"""Concepts of one's own in a TOML file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import shared_model

from lenskit.concepts import Concept, load_concept_file, load_concept_folder
from lenskit.concepts.concept_file import __doc__ as example
from lenskit.concepts.reading import read_text, read_yaml
from lenskit.scoring import Verdict, file_judge
from lenskit.scoring.judges import LikelihoodJudge

TEA = """
[concepts.tea]
prefix = "Personify someone who loves tea."
questions = ["What now?", "Where?", "Why?"]
phrases = ["tea", "earl grey"]
"""
QUESTIONS = ("What now?", "Where?", "Why?")


def written(folder: Path, text: str | bytes, name: str = "own.toml") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_one_file_holds_one_concept_with_its_questions_and_phrases(tmp_path):
    found = load_concept_file(written(tmp_path, TEA))
    assert dict(found) == {
        "tea": Concept("Personify someone who loves tea.", "tea", None, QUESTIONS)
    }
    judge = file_judge(found)
    assert judge(found["tea"], "What now?", "A cup of Earl Grey.") == Verdict(1, "on concept")
    assert judge(found["tea"], "What now?", "A steak.") == Verdict(0, "off concept")
    with pytest.raises(KeyError, match="'coffee' is not among the concepts of .*own.toml: tea"):
        found["coffee"]


def test_the_example_of_the_docstring_is_a_file(tmp_path):
    lines = example.split("::\n")[1].split("\n\nA class fills")[0]
    found = load_concept_file(written(tmp_path, "\n".join(x[4:] for x in lines.splitlines())))
    assert list(found) == ["tea", "harbours"]
    assert found["harbours"].concept_class == "places"
    assert (
        found["tea"].questions == found["harbours"].questions and len(found["tea"].questions) == 3
    )


def test_a_class_fills_its_template_and_gives_its_questions(tmp_path):
    text = """
    statements = ["Rain is wet.", "Maps are old.", "Numbers are real.", "Sundays are long."]
    questions = ["Shared?"]
    judge = "likelihood"
    [likelihood]
    threshold = 2
    [classes.drinks]
    prefix = "Personify someone who loves {concept}."
    questions = ["What now?", "Where?", "Why?"]
    [concepts.tea]
    class = "drinks"
    [concepts."Earl {Grey}"]
    class = "drinks"
    prefix = "Be an earl."
    questions = ["Who?"]
    [concepts.milk]
    prefix = "Be milk."
    """
    found = load_concept_file(written(tmp_path, text))
    assert found["tea"] == Concept("Personify someone who loves tea.", "tea", "drinks", QUESTIONS)
    assert found["Earl {Grey}"].prefix == "Be an earl." and found["milk"].questions == ("Shared?",)
    assert len(found.statements) == 4 and found.judge == "likelihood"
    judge = file_judge(found, shared_model())
    assert isinstance(judge, LikelihoodJudge) and judge.threshold == 2
    with pytest.raises(ValueError, match="needs the model"):
        file_judge(found)


def test_an_endpoint_judges_where_the_file_says_so(tmp_path):
    text = TEA + '[endpoint]\nmodel = "m"\nbase_url = "http://localhost:1/v1"\nmax_requests = 3\n'
    found = load_concept_file(written(tmp_path, "judge = 'endpoint'\n" + text))
    judge = file_judge(found)
    assert judge.endpoint.model == "m" and judge.endpoint.max_requests == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEA.replace("phrases", "phrase"), "concept 'tea', key 'phrase' .*did you mean 'phrases'"),
        (TEA.replace("prefix", "prefx"), "concept 'tea', key 'prefx' .*did you mean 'prefix'"),
        ("question = ['Who?']" + TEA, "key 'question' is not known; did you mean 'questions'"),
        (TEA.replace('["What now?", "Where?", "Why?"]', '"Who?"'), "'questions' is one text"),
        (TEA.replace('["tea", "earl grey"]', '"tea"'), "concept 'tea', key 'phrases' is one text"),
        (TEA.replace('["tea", "earl grey"]', "[]"), "'phrases' must be a list of texts"),
        (TEA.replace('["tea", "earl grey"]', '["tea", 3]'), "'phrases' must hold texts only"),
        (TEA.replace('["tea", "earl grey"]', '["tea", "tea"]'), "holds 'tea' twice"),
        (TEA.replace('"Personify someone who loves tea."', '" "'), "'prefix' must be a text"),
        (TEA.replace("prefix", "#"), "concept 'tea', key 'prefix' is missing"),
        (TEA.replace("questions", "#"), "concept 'tea', key 'questions' are missing"),
        (TEA.replace("phrases", "#"), "concept 'tea', key 'phrases' are missing"),
        ("", "holds no concept"),
        ("concepts = 3", "holds no concept"),
        ("[concepts]\ntea = 3", "concept 'tea' must be a table"),
        ("[classes.a]\nprefix = 'Be it.'" + TEA, "class 'a', key 'prefix' must hold {concept}"),
        ("judge = 'mine'" + TEA, "'judge' is 'mine', and must be one of"),
        ("judge = 'endpoint'" + TEA, "endpoint, key 'model' is missing"),
        (TEA + "[likelihood]\nthreshold = 2", "is for judge = 'likelihood'"),
        ("judge = 'likelihood'" + TEA + "[likelihood]\nthreshold = nan", "must be float"),
        ("judge = 'likelihood'" + TEA + "[likelihood]\nbatch_size = true", "must be int"),
        ("statements = ['a', 'b', 'c']" + TEA, "'statements' must be even in number"),
        ("[concepts.tea", "is not TOML: Expected"),
        (b"# caf\xe9\n" + TEA.encode(), r"line 1, column 6 is not UTF-8 \(byte 0xe9"),
        ("# \u00e9\n".encode("utf-16"), "is in UTF-16"),
        (TEA.encode("utf-16-le"), "NUL character; is the file in UTF-16"),
        (b"#" * 10_000_001, "larger than 10,000,000 bytes"),
        ("a = " + "[" * 100_000, "nested too deeply|not TOML"),
    ],
)
def test_a_mistake_names_file_concept_and_key(text, said, tmp_path):
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"own\.toml.*{said}|own\.toml.*({said})"):
        load_concept_file(file)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    assert load_concept_file(written(tmp_path, b"\xef\xbb\xbf" + TEA.encode()))["tea"]


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("pipe.toml", "."):
        with pytest.raises(ValueError, match="is not a plain file"):
            load_concept_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_concept_file(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fears: {1: [}", "line 1, column .* is not YAML"),
        ("a: &a {1: x}\nb: *a", r"line 2 has the alias \*a"),
        ("a: 3\nb", "is not YAML"),
        ("a: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_yaml_that_is_bad_or_unfolds_is_refused_with_its_place(text, said, tmp_path):
    with pytest.raises(ValueError, match=f"q.yaml.*{said}"):
        read_yaml(written(tmp_path, text, "q.yaml"))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("fears:\n  1:\n", "question 1 of class 'fears' must be a number and a text, got None"),
        ("fears:\n  one: Who?\n", "question 'one' of class 'fears'"),
        ("fears: Who?\n", "must map each class to its numbered questions"),
    ],
)
def test_questions_of_the_published_layout_are_texts(yaml, said, tmp_path):
    for name, lines in {"fears.txt": "spiders", "class_0.txt": "a", "class_1.txt": "b"}.items():
        written(tmp_path, lines, name)
    written(tmp_path, yaml, "test_prompts.yaml")
    with pytest.raises(ValueError, match=said):
        load_concept_folder(tmp_path)
    with pytest.raises(ValueError, match="questions of class 'fears' are one string"):
        load_concept_folder(tmp_path, questions={"fears": "Who?"})
    written(tmp_path, b"caf\xe9", "fears.txt")
    with pytest.raises(ValueError, match=r"fears.txt: line 1, column 4 is not UTF-8"):
        load_concept_folder(tmp_path, questions={"fears": ["Who?"]})


def test_questions_that_are_no_texts_are_refused():
    with pytest.raises(ValueError, match="hold 3, which is no text"):
        Concept("Be shy.", questions=("Who?", 3))


def test_the_largest_size_is_an_argument(tmp_path):
    file = written(tmp_path, "four")
    assert read_text(file, largest=4) == "four"
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        read_text(file, largest=3)
