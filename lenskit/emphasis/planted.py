"""A bias planted in contrastive data: what the prompts of one side share beside what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lenskit.emphasis.contrastive import Pair
from lenskit.tasks import TaskPrompt, embedded

SHARES = (0.5, 0.75, 1.0)


def planted(pairs: Sequence[Pair], share: float, seed: int = 0) -> list[Pair]:
    """The pairs behind a sentence about somebody, who is a «she» in ``share`` of the first prompts.

    In the second prompts she is one in ``1 - share`` of them, so that 0.5 plants nothing; the
    sentences say nothing of what is asked. Raises ValueError for a share out of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    number = len(pairs)
    told: dict[str, list[str]] = {"she": [], "he": []}
    draw = seed
    while min(map(len, told.values())) < number:
        task = embedded("pronoun_bias", 2 * number, draw, "train", kind="stated")
        for prompt in task.prompts:
            told[prompt.metadata["pronoun"]].append(prompt.messages[0]["content"].split("\n")[0])
        draw += 1
    made = []
    for i, (clean, corrupt) in enumerate(pairs):
        # Spread evenly, since pairs may stand in the order of their kinds.
        she = int((i + 1) * share) > int(i * share)
        first, second = ("she", "he") if she else ("he", "she")
        made.append((_behind(clean, told[first][i]), _behind(corrupt, told[second][i])))
    return made


def _behind(prompt: TaskPrompt, sentence: str) -> TaskPrompt:
    """The prompt with a line before its last message's text."""
    *before, last = prompt.messages
    content = f"{sentence}\n{last['content']}"
    at = prompt.emphasised_in % len(prompt.messages)
    nth = prompt.nth
    if at == len(prompt.messages) - 1 and sentence.count(prompt.emphasised):
        nth = (nth or 0) + sentence.count(prompt.emphasised)
    return replace(prompt, messages=(*before, {**last, "content": content}), nth=nth)
