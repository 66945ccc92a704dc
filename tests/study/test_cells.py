"""A folder of cells: what a kill, damage or other settings leave of it."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lenskit.study.cells import SETTINGS, CellStore

SETTING = {"model": "m:1", "coefficients": [1.0, 2.0]}
A = {("fears", "a"): [{"answer": "öl \ud800", "score": 1}], ("fears", "b"): []}
B = {("moods", "c"): [{"answer": "", "score": 0.5}, {"answer": "x\ny", "score": 0}]}


def filled(folder):
    store = CellStore(folder, SETTING)
    store.add(A)
    store.add(B)
    store.close()
    (file,) = folder.glob("cells-*.jsonl")
    return file


def test_what_was_added_is_found_again(tmp_path):
    filled(tmp_path)
    again = CellStore(tmp_path, SETTING)
    assert again.cells == A | B and again.damaged == ()
    assert CellStore.existing(tmp_path).cells == A | B


def test_a_store_in_memory_and_one_in_a_folder_hold_the_same(tmp_path):
    import numpy as np
    import torch

    rows = {("k",): [{"a": np.int64(1), "b": np.float32(0.5), "c": torch.tensor(True), "d": (1,)}]}
    stores = [CellStore(None, SETTING), CellStore(tmp_path, SETTING)]
    for store in stores:
        store.add(rows)
    found = [stores[0].cells, stores[1].cells, CellStore(tmp_path, SETTING).cells]
    assert found == [{("k",): [{"a": 1, "b": 0.5, "c": True, "d": [1]}]}] * 3


@pytest.mark.parametrize("cut", range(0, 160, 7))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path, cut):
    file = filled(tmp_path)
    data = file.read_bytes()
    kept = data[: max(0, len(data) - cut)]
    file.write_bytes(kept)
    found = CellStore(tmp_path, SETTING)
    whole = kept.count(b"\n")
    assert found.cells == [{}, A, A | B][whole]
    torn = bool(kept) and not kept.endswith(b"\n")
    assert len(found.damaged) == torn
    if torn:
        assert found.damaged[0] == f"{file}, line {whole + 1} is torn"


@hypothesis_settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_a_cell(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flip")
    file = filled(folder)
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    file.write_bytes(bytes(data))
    found = CellStore(folder, SETTING)
    assert found.damaged and all(str(file) in said for said in found.damaged)
    assert found.cells in ({}, A, B)


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"\xff\xfe{\x00}\x00\n", b"[" * 200_000])
def test_files_that_are_empty_or_of_others_hold_no_cells(tmp_path, content):
    filled(tmp_path).write_bytes(content)
    assert CellStore(tmp_path, SETTING).cells == {}


def test_a_line_of_other_settings_is_refused_with_its_place(tmp_path):
    filled(tmp_path / "a")
    other = CellStore(tmp_path / "b", SETTING | {"model": "m:2"})
    other.add(A)
    (line,) = (tmp_path / "b").glob("cells-*")
    os.replace(line, tmp_path / "a" / line.name)
    with pytest.raises(ValueError, match=f"{line.name}, line 1 was computed with other settings"):
        CellStore(tmp_path / "a", SETTING)


def test_other_settings_are_refused_and_named(tmp_path):
    filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(they differ in coefficients\)"):
        CellStore(tmp_path, SETTING | {"coefficients": [1.0]})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_deleted_settings_are_not_written_around_old_results(tmp_path):
    filled(tmp_path)
    (tmp_path / SETTINGS).unlink()
    for settings in (SETTING, {"model": "m:2"}):
        with pytest.raises(ValueError, match="without settings.json"):
            CellStore(tmp_path, settings)
    assert not (tmp_path / SETTINGS).exists()
    with pytest.raises(ValueError, match="holds no study"):
        CellStore.existing(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1, column 1"),
        (b'{"layout": "cells 1",\n "settings"', "line 2, column 12"),
        (b'{"layout": "\xe9"}', "byte 12 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "digits"),
        (b"{}", "layout"),
        (b" " * (2**24 + 1), "more than"),
    ],
)
def test_damaged_settings_are_refused_with_file_and_place(tmp_path, content, said):
    filled(tmp_path)
    (tmp_path / SETTINGS).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        CellStore(tmp_path, SETTING)
    assert str(tmp_path / SETTINGS) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", [SETTINGS, "cells-0.jsonl"])
def test_a_fifo_is_refused_at_once(tmp_path, name):
    filled(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        CellStore(tmp_path, SETTING)


def test_a_folder_of_an_earlier_lenskit_is_refused(tmp_path):
    (tmp_path / "study.settings").write_text("{}")
    for opened in (lambda: CellStore(tmp_path, SETTING), lambda: CellStore.existing(tmp_path)):
        with pytest.raises(ValueError, match="earlier lenskit"):
            opened()


def test_two_writers_have_files_of_their_own_and_a_cell_counts_once(tmp_path):
    one, two = CellStore(tmp_path, SETTING), CellStore(tmp_path, SETTING)
    one.add(A)
    two.add(B)
    two.add(A)
    assert len(list(tmp_path.glob("cells-*.jsonl"))) == 2
    found = CellStore(tmp_path, SETTING)
    assert found.cells == A | B and not found.damaged


def test_a_torn_write_is_not_followed_by_another_line(tmp_path, monkeypatch):
    store = CellStore(tmp_path, SETTING)
    store.add(A)
    write = os.write

    def full(handle, data):
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return write(handle, data[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.add(B)
    assert store.cells == A
    monkeypatch.undo()
    store.add(B)
    found = CellStore(tmp_path, SETTING)
    assert found.cells == A | B and len(found.damaged) == 1


def test_lines_are_plain_json(tmp_path):
    for line in filled(tmp_path).read_text(encoding="ascii").splitlines():
        assert set(json.loads(line)) == {"check", "settings", "cells"}
