"""Public functions show how they are used; ``pytest --doctest-modules`` runs what they show."""

from __future__ import annotations

import doctest
from types import FunctionType

import pytest

import lenskit as lk

FUNCTIONS = [name for name in lk.__all__ if isinstance(getattr(lk, name), FunctionType)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_a_short_example_of_its_own_use(name):
    examples = doctest.DocTestParser().get_examples(getattr(lk, name).__doc__)
    assert any(f"{name}(" in example.source for example in examples)
    assert len(examples) <= 6


def test_the_package_says_what_the_examples_start_from():
    assert doctest.DocTestParser().get_examples(lk.__doc__)
