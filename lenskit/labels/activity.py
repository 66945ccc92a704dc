"""The truth of the embedded grammar as labels: what others can only be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.capture import Capture
from lenskit.embedded.grammar import load_grammar, trained_activity
from lenskit.prompts import PromptSet
from lenskit.selector import TokenSelection

Activity: TypeAlias = Mapping[str, Mapping[str, float]]


def true_activity(prompts: PromptSet, activity: Activity | None = None) -> Float[Tensor, " prompt"]:
    """The rate at which a concept of the grammar shows in answers to each prompt (0 to 1).

    The truth is that which the embedded model was trained on (``trained_activity``), whatever the
    grammar's files say now; 0 for a prompt without the prefix. ``activity``: the rates by class and
    topic that another model was trained on, as its ``training.json`` keeps them. Raises ValueError
    where concept or statements are not the grammar's own.

    >>> activity = lk.true_activity(prompts)
    >>> bool((activity[~prompts.has_prefix] == 0).all())
    True
    """
    grammar, concept = load_grammar(), prompts.concept
    rules = grammar.classes.get(concept.concept_class or "")
    if rules is None or concept.name not in rules.entries:
        raise ValueError(f"the true activity of concept {concept.name!r} is not known")
    topics = {
        s: topic for topic, parts in grammar.statements.items() for h in parts for s in parts[h]
    }
    if unknown := [s for s in prompts.statements if s not in topics]:
        raise ValueError(
            f"{unknown[0]!r} is not a statement of the grammar, so its topic is unknown"
        )
    own = (trained_activity() if activity is None else activity)[rules.name]
    rates = [own[topics[statement]] for statement in prompts.statements]
    return torch.tensor(rates) * prompts.has_prefix


def activity_labels(
    capture: Capture, tokens: TokenSelection | None = None
) -> Float[Tensor, "prompt layer"]:
    """``true_activity`` of each prompt as a label, the same at every block.

    ``tokens`` is not used, but must fit. Raises ValueError as ``true_activity``.

    >>> labels = lk.activity_labels(capture)
    >>> bool((labels[~prompts.has_prefix] == 0).all())
    True
    """
    if tokens is not None:
        tokens.check(capture.candidates, capture.layers)
    return true_activity(capture.prompts)[:, None].expand(-1, capture.layers).clone()
