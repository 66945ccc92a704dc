"""Where prompts end: the last run of the closing tokens in each row, pass after pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.models import ClosingTokens, chunk_of

TEXTS = ("a", "b", "c")


def found(closing: ClosingTokens, ids, mask, *, needed=False) -> list[list[int]]:
    chunk = chunk_of((), {"input_ids": ids, "attention_mask": mask})
    places = closing.places(chunk, torch.full(ids.shape[:1], needed))
    return (torch.zeros_like(ids) if places is None else places).tolist()


def by_hand(run: list[int], ids: list[int], mask: list[int]) -> list[int]:
    """The last place where the run stands on real tokens, by trying them all."""
    places = [0] * len(ids)
    for first in range(len(ids) - len(run), -1, -1):
        window = range(first, first + len(run))
        if all(mask[i] and ids[i] == run[i - first] for i in window):
            for i in window:
                places[i] = i - first + 1
            break
    return places


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_last_run_on_real_tokens_is_found_whatever_stands_around_it(data):
    # Two tokens alone, so that runs come often, overlap and begin again.
    token = st.integers(0, 1)
    run = data.draw(st.lists(token, min_size=1, max_size=3))
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    ids = data.draw(
        st.lists(st.lists(token, min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    mask = []
    for _ in range(rows):
        left = data.draw(st.integers(0, length - 1))
        right = data.draw(st.integers(0, length - 1 - left))
        mask.append([0] * left + [1] * (length - left - right) + [0] * right)
    closing = ClosingTokens(run, TEXTS[: len(run)])
    places = found(closing, torch.tensor(ids), torch.tensor(mask))
    assert places == [by_hand(run, *row) for row in zip(ids, mask, strict=True)]


@settings(max_examples=50, deadline=None)
@given(more=st.lists(st.integers(0, 2), max_size=8), padding=st.integers(0, 2))
def test_whatever_is_generated_token_by_token_the_prompt_ends_where_it_ended(more, padding):
    # The first row is padded with closing tokens, the second has an earlier turn.
    ids = torch.tensor([[0, 1] * padding + [2, 0, 1], [0, 1] * padding + [2, 0, 1]])
    mask = torch.ones_like(ids)
    mask[0, : 2 * padding] = 0
    closing = ClosingTokens([0, 1], TEXTS[:2])
    expected = found(closing, ids, mask)
    assert all(row[-2:] == [1, 2] for row in expected)
    for token in more:
        ids = torch.cat([ids, torch.full((2, 1), token)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        expected = [[*row, 0] for row in expected]
        assert found(closing, ids, mask) == expected
    closing.forget()
    anew = zip(ids.tolist(), mask.tolist(), strict=True)
    assert found(closing, ids, mask) == [by_hand([0, 1], *row) for row in anew]


def test_a_row_that_needs_the_tokens_and_lacks_them_is_named():
    closing = ClosingTokens([7, 8], ("<answer>", ":"))
    ids, mask = torch.tensor([[1, 7, 8], [7, 8, 1], [8, 7, 7]]), torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"row 2 of the batch, of 3 tokens.*'<answer>', ':'.*7, 8"):
        found(closing, ids, mask, needed=True)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="row 1 of the batch, of 2 tokens"):
        found(closing, ids[:2], mask[:2], needed=True)
    assert found(closing, ids, mask) == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
