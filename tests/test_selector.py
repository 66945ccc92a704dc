from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lenskit.capture import Capture
from lenskit.concepts import Concept
from lenskit.models import Tokens
from lenskit.prompts import PromptSet
from lenskit.selector import TokenSelection, fixed_token, select_tokens

CANDIDATES = ("<eot>", "assistant", "\n\n")


def made_capture(attention: torch.Tensor, has_prefix: list[bool]) -> Capture:
    """A capture with the given attention ``[prompt, layer, head, candidate]``, of no model."""
    prompts, layers, _, candidates = attention.shape
    ids = torch.arange(candidates).repeat(prompts, 1)
    tokens = Tokens(ids, torch.ones_like(ids))
    set_of = PromptSet(
        Concept(prefix="Take on a mood."),
        tokens,
        torch.zeros_like(ids, dtype=torch.bool),
        torch.tensor(has_prefix),
        CANDIDATES[:candidates],
        tuple(str(i) for i in range(prompts)),
        torch.full((prompts,), -1),
    )
    return Capture(set_of, attention, torch.zeros(prompts, layers, candidates, 2), "none:0")


def brute_force(attention, has_prefix, heads: str, prompts: str) -> list[int]:
    """Equation 3 with plain loops, later tokens winning ties."""
    of_heads = {"mean": lambda v: torch.stack(v).mean(), "max": max}[heads]
    of_prompts = {"mean": lambda v: torch.stack(v).mean(), "max": max}[prompts]
    chosen = []
    for layer in range(attention.shape[1]):
        best, place = -1.0, -1
        for t in range(attention.shape[3]):
            value = of_prompts(
                [
                    of_heads(list(row[layer, :, t]))
                    for row, p in zip(attention, has_prefix, strict=True)
                    if p
                ]
            )
            if value >= best:
                best, place = value, t
        chosen.append(place)
    return chosen


# Quarters, so that ties are common and means exact.
attentions = arrays("int64", (4, 3, 2, 3), elements=st.integers(0, 4)).map(
    lambda values: torch.from_numpy(values).float() / 4
)


@given(
    attentions,
    st.sampled_from(["mean", "max"]),
    st.sampled_from(["mean", "max"]),
    st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda p: p.count(True) in (1, 2, 4)),
)
def test_the_selection_is_equation_three(attention, heads, prompts, has_prefix):
    selection = select_tokens(made_capture(attention, has_prefix), heads=heads, prompts=prompts)
    assert selection.index.tolist() == brute_force(attention, has_prefix, heads, prompts)


@given(attentions, st.permutations(range(4)))
def test_the_order_of_prompts_does_not_change_the_selection(attention, order):
    captured = made_capture(attention, [True, False, True, True])
    assert torch.equal(
        select_tokens(captured).index, select_tokens(captured.rows(list(order))).index
    )


def test_of_equal_candidates_the_later_token_is_taken():
    attention = torch.zeros(2, 2, 1, 3)
    attention[:, 1, 0] = torch.tensor([0.5, 0.5, 0.1])
    assert select_tokens(made_capture(attention, [True, True])).offsets.tolist() == [-1, -2]


def test_prompts_without_a_prefix_are_not_looked_at():
    attention = torch.zeros(2, 1, 1, 3)
    attention[0, 0, 0, 0] = 0.1
    attention[1, 0, 0, 2] = 0.9
    assert select_tokens(made_capture(attention, [True, False])).index.tolist() == [0]


def test_the_options_differ_where_they_should():
    attention = torch.zeros(2, 1, 2, 3)
    attention[0, 0, :, 0] = torch.tensor([0.9, 0.0])
    attention[:, 0, :, 1] = 0.4
    attention[1, 0, 0, 2] = 0.85
    captured = made_capture(attention, [True, True])
    assert select_tokens(captured).index.tolist() == [0]
    assert select_tokens(captured, prompts="mean").index.tolist() == [1]
    attention[0, 0, 0, 0] = 0.7
    assert select_tokens(captured).index.tolist() == [2]
    assert select_tokens(captured, heads="max").index.tolist() == [2]


def test_a_selection_knows_its_tokens_and_offsets():
    selection = TokenSelection(torch.tensor([0, 2, 1]), CANDIDATES, "by hand")
    assert selection.offsets.tolist() == [-3, -1, -2]
    assert selection.tokens == ("<eot>", "\n\n", "assistant")


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_taking_reads_each_blocks_own_token(index):
    values = torch.arange(4 * 3 * 3 * 2).reshape(4, 3, 3, 2).float()
    taken = TokenSelection(torch.tensor(index), CANDIDATES, "").take(values)
    assert taken.shape == (4, 3, 2)
    for layer, place in enumerate(index):
        assert torch.equal(taken[:, layer], values[:, layer, place])


@pytest.mark.parametrize("offset", [-3, -2, -1])
def test_a_fixed_token_is_the_same_in_every_block(offset):
    selection = fixed_token(made_capture(torch.zeros(2, 4, 1, 3), [True, False]), offset)
    assert selection.offsets.tolist() == [offset] * 4
    assert str(offset) in selection.rule


@pytest.mark.parametrize("offset", [0, 1, -4])
def test_a_fixed_token_that_is_no_candidate_is_refused(offset):
    with pytest.raises(ValueError, match="from -3 to -1.*assistant"):
        fixed_token(made_capture(torch.zeros(2, 4, 1, 3), [True, False]), offset)


def test_impossible_selections_are_refused():
    captured = made_capture(torch.zeros(2, 2, 1, 3), [True, False])
    with pytest.raises(ValueError, match="heads must be 'mean' or 'max'"):
        select_tokens(captured, heads="sum")
    with pytest.raises(ValueError, match="prompts must be 'mean' or 'max'"):
        select_tokens(captured, prompts="median")
    with pytest.raises(ValueError, match="no prompt with a prefix"):
        select_tokens(captured.rows([1]))
    with pytest.raises(ValueError, match="0 to 2"):
        TokenSelection(torch.tensor([3]), CANDIDATES, "")
    with pytest.raises(ValueError, match="layer=1"):
        TokenSelection(torch.tensor([0]), CANDIDATES, "").take(torch.zeros(2, 2, 3))


def test_a_real_capture_gives_a_token_for_each_block():
    from lenskit.capture import capture
    from lenskit.prompts import build_prompts

    model = tiny.shared_model()
    prompts = build_prompts(model, "Take on a cheerful mood.", number=12)
    captured = capture(model, prompts, progress=False)
    selection = select_tokens(captured)
    assert selection.candidates == tiny.CLOSING
    assert selection.index.tolist() == brute_force(
        captured.attention_to_prefix, prompts.has_prefix.tolist(), "mean", "max"
    )
