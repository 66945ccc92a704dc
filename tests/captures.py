"""Captures made by hand."""

from __future__ import annotations

import torch

from lenskit import Capture, Concept, PromptSet, Tokens
from lenskit.embedded.grammar import load_grammar


def captured_with(attention: torch.Tensor) -> Capture:
    """A capture of these patterns; every other prompt has a prefix."""
    grammar = load_grammar()
    number, layers, _, candidates = attention.shape
    ids = torch.zeros(number, 8, dtype=torch.long)
    statements = [s for _, s in grammar.half("first")][:number]
    name, rules = next(iter(grammar.classes.items()))
    concept = next(iter(rules.entries))
    prompts = PromptSet(
        Concept(rules.prefix_for(concept), concept, name),
        Tokens(ids, torch.ones_like(ids)),
        torch.zeros_like(ids, dtype=torch.bool),
        torch.arange(number) % 2 == 0,
        tuple("abcde"[:candidates]),
        tuple(statements),
        torch.full((number,), -1),
    )
    resid = torch.zeros(number, layers, candidates, 4)
    return Capture(prompts, attention, resid, "model")
