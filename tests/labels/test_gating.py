from __future__ import annotations

import pytest
import torch
from captures import captured_with

from lenskit import activity_labels, gating_head, gating_labels, true_activity
from lenskit.labels import two_groups_p_value

SIZES = {"few": 20, "many": 200}


def test_the_gating_label_is_the_attention_that_varies_most_over_prefixed_prompts():
    generator = torch.Generator().manual_seed(0)
    attention = 0.05 * torch.rand(12, 2, 3, 4, generator=generator)
    gate = torch.tensor([0.9, 0, 0.1, 0, 0.8, 0, 0.2, 0, 0.5, 0, 0.3, 0])
    attention[:, 1, 2, 3] = gate
    # Without a prefix there is none to attend to, however much the numbers vary.
    attention[1::2, 0, 0, 0] = torch.tensor([0.0, 1, 0, 1, 0, 1])
    found = gating_head(captured_with(attention))
    assert (found.block, found.head, found.candidate) == (1, 2, 3)
    torch.testing.assert_close(found.label, gate / 0.9)
    with pytest.raises(ValueError, match="no head's attention to the prefix varies"):
        gating_head(captured_with(torch.full((12, 2, 3, 4), 0.3)))


def test_gating_labels_are_the_same_in_all_blocks_and_zero_without_a_prefix():
    attention = torch.zeros(12, 3, 1, 2)
    attention[::2, 1, 0, 1] = torch.tensor([0.9, 0.1, 0.8, 0.1, 0.9, 0.1])
    labels = gating_labels(captured_with(attention))
    assert labels.shape == (12, 3) and bool((labels == labels[:, :1]).all())
    assert bool((labels[1::2] == 0).all()) and labels.max() == 1


def test_where_no_head_gates_the_labels_come_with_a_warning():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(80, 2, 2, 2, generator=generator)
    with pytest.warns(UserWarning, match="no head gates .* need not follow activity"):
        gating_labels(captured_with(attention))
    assert not gating_head(captured_with(attention)).gates


@pytest.mark.parametrize("number", SIZES.values(), ids=SIZES)
def test_two_groups_are_told_from_one(number):
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(number, generator=generator)
    two = torch.where(torch.arange(number) % 3 == 0, one + 12, one)
    few = torch.where(torch.arange(number) == 0, one + 12, one)
    assert two_groups_p_value(two) < 0.01
    for values in (one, one.exp(), torch.rand(number, generator=generator), few):
        assert two_groups_p_value(values) > 0.05


def test_the_test_of_two_groups_knows_neither_scale_nor_order_and_is_right_under_its_null():
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(40, generator=generator)
    moved = 3 - 0.2 * values[torch.randperm(40, generator=generator)]
    assert two_groups_p_value(moved) == two_groups_p_value(values)
    found = [two_groups_p_value(torch.rand(30, generator=generator)) for _ in range(200)]
    assert 0.01 <= sum(p < 0.05 for p in found) / 200 <= 0.1
    assert two_groups_p_value(torch.ones(9)) == two_groups_p_value(torch.rand(3)) == 1


def test_activity_labels_are_the_truth_at_every_block():
    made = captured_with(torch.rand(12, 3, 1, 2))
    labels = activity_labels(made)
    assert labels.shape == (12, 3)
    for block in range(3):
        torch.testing.assert_close(labels[:, block], true_activity(made.prompts))
    assert bool((labels[1::2] == 0).all()) and len(labels[::2].unique()) > 1
