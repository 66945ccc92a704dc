"""Concepts: what a prefix activates, those of the embedded grammar, and the published layout."""

from __future__ import annotations

from lenskit.concepts.choices import (
    BLOCKS,
    TOKENS,
    among,
    choose_concepts,
    number_wanted,
    read_blocks,
    read_numbers,
    read_phrases,
    read_shard,
    read_tokens,
    spread,
)
from lenskit.concepts.concept import (
    Concept,
    ConceptClass,
    concepts,
    question_prompt,
    statement_prompt,
    statements,
)
from lenskit.concepts.concept_file import ConceptFile, load_concept_file
from lenskit.concepts.published import load_concept_folder

__all__ = [
    "choose_concepts",
    "number_wanted",
    "read_blocks",
    "read_numbers",
    "read_phrases",
    "read_shard",
    "read_tokens",
    "among",
    "spread",
    "BLOCKS",
    "TOKENS",
    "Concept",
    "ConceptFile",
    "ConceptClass",
    "concepts",
    "question_prompt",
    "statement_prompt",
    "statements",
    "load_concept_file",
    "load_concept_folder",
]


def __dir__() -> list[str]:
    return __all__
