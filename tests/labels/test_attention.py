from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_selector import CANDIDATES, attentions, made_capture

from lenskit.labels import hard_labels, soft_labels
from lenskit.selector import TokenSelection, select_tokens

PREFIXED = [True, False, True, True]


def brute_force(attention, has_prefix, index, heads: str) -> torch.Tensor:
    """Equation 4 and its scaling with plain loops."""
    labels = torch.zeros(attention.shape[:2])
    for layer, place in enumerate(index):
        raw = []
        for row, prefixed in zip(attention, has_prefix, strict=True):
            values = row[layer, :, place]
            raw.append(float(values.mean() if heads == "mean" else values.max()) * prefixed)
        for p, value in enumerate(raw):
            labels[p, layer] = (value - min(raw)) / (max(raw) - min(raw))
    return labels


def chosen(index: list[int]) -> TokenSelection:
    return TokenSelection(torch.tensor(index), CANDIDATES, "by hand")


@given(
    attentions,
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
    st.sampled_from(["mean", "max"]),
    st.sampled_from([PREFIXED, [True] * 4]),
)
def test_soft_labels_are_equation_four(attention, index, heads, has_prefix):
    captured = made_capture(attention, has_prefix)
    try:
        labels = soft_labels(captured, chosen(index), heads=heads)
    except ValueError:
        assume(False)
    torch.testing.assert_close(labels, brute_force(attention, has_prefix, index, heads))
    assert labels.amin(dim=0).tolist() == [0.0] * 3
    assert labels.amax(dim=0).tolist() == [1.0] * 3


def test_a_prompt_without_prefix_is_zero_whatever_the_capture_says():
    attention = torch.full((3, 1, 2, 3), 0.7)
    attention[0] = 0.2
    labels = soft_labels(made_capture(attention, [True, False, True]), chosen([1]))
    assert labels.flatten().tolist() == pytest.approx([2 / 7, 0.0, 1.0])


def test_hard_labels_are_one_for_the_prefix_and_zero_without():
    captured = made_capture(torch.rand(4, 3, 2, 3), PREFIXED)
    labels = hard_labels(captured, select_tokens(captured))
    assert labels.tolist() == [[1.0] * 3, [0.0] * 3, [1.0] * 3, [1.0] * 3]
    assert torch.equal(hard_labels(captured), labels)
    labels[0, 0] = 5.0
    assert hard_labels(captured)[0, 1] == 1.0


def test_blocks_without_a_scale_are_named():
    attention = torch.rand(4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    attention[:, 0] = 0.0
    attention[:, 2] = 0.0
    captured = made_capture(attention, PREFIXED)
    with pytest.raises(ValueError, match=r"block\(s\) 0, 2"):
        soft_labels(captured, chosen([0, 1, 2]))


def test_blocks_without_a_scale_can_have_hard_labels():
    attention = torch.rand(4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    others = soft_labels(made_capture(attention, PREFIXED), chosen([0, 1, 2]))
    attention[:, 2] = 0.0
    labels = soft_labels(made_capture(attention, PREFIXED), chosen([0, 1, 2]), constant="hard")
    assert labels[:, 2].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert torch.equal(labels[:, :2], others[:, :2])


def test_unknown_options_are_refused_by_name():
    captured = made_capture(torch.rand(4, 3, 2, 3), PREFIXED)
    with pytest.raises(ValueError, match="heads must be 'mean' or 'max'"):
        soft_labels(captured, chosen([0, 0, 0]), heads="sum")
    with pytest.raises(ValueError, match="constant must be 'raise' or 'hard'"):
        soft_labels(captured, chosen([0, 0, 0]), constant="zero")
