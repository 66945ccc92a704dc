"""The emphasised span of a task's prompt as tokens of a model's templated conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lenskit.attention import Span, span
from lenskit.embedded.tasks import TaskPrompt

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def emphasised_span(
    model: TransformerBridge,
    prompt: TaskPrompt,
    *,
    template_arguments: Mapping[str, Any] | None = None,
) -> Span:
    """The tokens of what the prompt emphasises, in whichever message it stands, for ``attend``.

    Raises ValueError where it holds no token of the model.

    >>> prompt = lk.tasks.embedded("format", 1, kind="json").prompts[0]
    >>> lk.tasks.emphasised_span(model, prompt).text == prompt.emphasised
    True
    """
    # Counted through the whole conversation, since templates may trim the texts of messages.
    earlier = range(prompt.emphasised_in % len(prompt.messages))
    before = sum(prompt.messages[i]["content"].count(prompt.emphasised) for i in earlier)
    return span(
        model,
        prompt.messages,
        prompt.emphasised,
        nth=before + (prompt.nth or 0),
        template_arguments=template_arguments,
    )
