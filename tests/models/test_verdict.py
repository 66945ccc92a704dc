from __future__ import annotations

import json
import shutil

import pytest
import torch

import lenskit._data
from lenskit.models import EMBEDDED, load_model, load_tokenizer, model_report, verdict
from lenskit.models.loading import Reference
from lenskit.models.verdict import FILE, kept_report


class Checked(BaseException):
    """Raised where the check would begin."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the embedded model with a verdict of its own, which ``load_model`` takes for it."""
    copy = tmp_path / EMBEDDED
    shutil.copytree(lenskit._data.data_path(EMBEDDED), copy)
    monkeypatch.setattr(lenskit._data, "data_path", lambda name: copy)
    report = json.loads((copy / FILE).read_text())["report"]
    (copy / FILE).write_text(json.dumps({**verdict._circumstances(copy), "report": report}))
    return copy


@pytest.fixture
def no_check(monkeypatch):
    def read(*arguments):
        raise Checked

    monkeypatch.setattr(Reference, "read", read)


def test_the_verdict_that_comes_with_the_model_is_the_one_that_the_check_gives(folder):
    shipped = json.loads((folder / FILE).read_text())["report"]
    (folder / FILE).unlink()
    found = model_report(load_model(device="cpu"))
    again = "run python -m lenskit.models.verdict"
    assert shipped["fires"] == [*found.fires] and shipped["edits"] == [*found.edits], again
    assert found.pattern_error < 1e-5 and found.resid_error < 1e-5


def test_the_verdict_that_comes_with_the_model_is_of_its_weights():
    place = lenskit._data.data_path(EMBEDDED)
    files = json.loads((place / FILE).read_text())["files"]
    again = f"{FILE} is of other weights: run python -m lenskit.models.verdict"
    assert files == verdict._circumstances(place)["files"], again


def test_a_kept_verdict_stands_for_the_check(folder, no_check):
    report = model_report(load_model(device="cpu"))
    assert report == kept_report(folder) and report.blocks == 8 and report.pattern_error < 1e-5


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_checked_again(folder, no_check, name):
    data = bytearray((folder / name).read_bytes())
    if name == "model.safetensors":
        data[-1] ^= 1
    else:
        data += b"\n"
    (folder / name).write_bytes(data)
    with pytest.raises(Checked):
        load_model(device="cpu")


def test_other_packages_another_dtype_model_or_tokenizer_are_checked(folder, no_check, monkeypatch):
    tokenizer = load_tokenizer(str(folder))
    given = load_model(device="cpu", check=False).original_model
    for arguments in (
        {"device": "cpu", "dtype": torch.bfloat16},
        {"device": "cpu", "tokenizer": tokenizer},
        {"hf_model": type(given).from_pretrained(folder)},
    ):
        with pytest.raises(Checked):
            load_model(EMBEDDED, **arguments)
    monkeypatch.setattr(verdict, "version", lambda package: "99.1.0")
    with pytest.raises(Checked):
        load_model(device="cpu")


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"files": 1, "versions": 2}', "\udc80"])
def test_a_damaged_verdict_is_none(folder, written):
    (folder / FILE).write_bytes(written.encode("utf-8", "surrogateescape"))
    assert kept_report(folder) is None
