from __future__ import annotations

import json

import pytest
import torch

from lenskit.attention import Heads


def test_heads_are_the_same_by_block_and_by_pairs():
    assert Heads({3: [0, 5], 4: [1]}) == Heads([(4, 1), (3, 5), (3, 0), (3, 0)])
    assert Heads({3: [0, 5], 4: [1]}).by_block() == {3: (0, 5), 4: (1,)}


def test_heads_have_the_operations_of_a_set():
    one, other = Heads({0: [0, 1]}), Heads({0: [1], 2: [3]})
    assert list(one | other) == [(0, 0), (0, 1), (2, 3)]
    assert list(one & other) == [(0, 1)]
    assert list(one - other) == [(0, 0)]
    assert list(one ^ other) == [(0, 0), (2, 3)]
    assert (one & other) <= one and not one <= other
    assert (2, 3) in other and (2, 3) not in one and len(one) == 2


def test_heads_are_read_and_written_in_the_form_of_pasta(tmp_path):
    published = tmp_path / "heads.json"
    published.write_text('{"16": [0, 5, 11], "3": [2]}')
    heads = Heads.load(published)
    assert heads == Heads({3: [2], 16: [0, 5, 11]})
    heads.save(tmp_path / "own.json")
    assert json.loads((tmp_path / "own.json").read_text()) == {"3": [2], "16": [0, 5, 11]}
    assert Heads.load(tmp_path / "own.json") == heads


@pytest.mark.parametrize(
    "content", ['{"3": [0,', "[1, 2]", '{"three": [0]}', '{"3": [0.5]}', '{"3": 4}', '{"3": [-1]}']
)
def test_a_damaged_file_of_heads_is_refused_by_name(tmp_path, content):
    file = tmp_path / "heads.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="heads.json"):
        Heads.load(file)


@pytest.mark.parametrize("wrong", [3, "12", {0: 1}, {0: "1"}, [(0, 1, 2)], [(0, -1)], [(True, 1)]])
def test_what_is_no_set_of_heads_is_refused(wrong):
    with pytest.raises(ValueError):
        Heads(wrong)


def test_a_mask_says_which_heads_of_the_model_are_meant(model):
    mask = Heads({2: [0, 3]}).mask(model)
    assert mask.shape == (3, 4) and mask.nonzero().tolist() == [[2, 0], [2, 3]]
    assert torch.equal(Heads.all(model).mask(model), torch.ones(3, 4, dtype=torch.bool))
    assert Heads.all(model, blocks=[1]).by_block() == {1: (0, 1, 2, 3)}
    with pytest.raises(ValueError, match=r"\(3, 0\).*3 blocks of 4 heads"):
        Heads([(3, 0)]).mask(model)
