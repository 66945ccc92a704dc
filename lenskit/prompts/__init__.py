"""Prompts with and without a concept's prefix: about statements, or from token ids."""

from __future__ import annotations

from lenskit.prompts.build import build_prompts
from lenskit.prompts.prompt_set import PromptSet, row_index, with_separator
from lenskit.prompts.token_ids import prompts_from_ids

__all__ = ["PromptSet", "build_prompts", "prompts_from_ids", "row_index", "with_separator"]


def __dir__() -> list[str]:
    return __all__
