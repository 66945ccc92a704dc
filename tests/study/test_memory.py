"""Peak memory of computations whose sizes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lenskit.study.memory import peak_bytes

MIB = 2**20


def test_tensors_count_while_they_are_held():
    given = torch.zeros(MIB, dtype=torch.uint8)

    def run() -> None:
        for _ in range(3):
            one = given + 1  # 1 MiB, gone before the next
        del one
        both = [given + 1, given + 2]
        assert both[0][5:].view(-1)[0] == 1  # a view holds nothing of its own

    assert peak_bytes(run) == pytest.approx(2 * MIB, rel=0.1)


def test_arrays_count_and_what_was_there_before_does_not():
    given = np.zeros(4 * MIB, dtype=np.uint8)
    assert peak_bytes(lambda: (given + 1).sum()) == pytest.approx(4 * MIB, rel=0.1)
    assert peak_bytes(lambda: torch.from_numpy(given).view(2, -1)) < 0.1 * MIB


def test_what_fails_leaves_no_trace_behind():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert peak_bytes(lambda: None) < 0.1 * MIB
