"""The model that most tests share, and a check that they leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import tiny
from steered import nothing_left

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return tiny.shared_model()


@pytest.fixture
def nothing_left_on(model: TransformerBridge) -> Iterator[None]:
    with nothing_left(model):
        yield
