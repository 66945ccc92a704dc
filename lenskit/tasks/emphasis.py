"""What a prompt alone can do for its span: mark it, repeat it, or show solved examples.

Each function takes a prompt and gives one whose span is still found: once, or by its ``nth``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType

from lenskit._arguments import whole
from lenskit.embedded.dialogue import assistant, user
from lenskit.embedded.tasks import TaskPrompt

MARKS: Mapping[str, str] = MappingProxyType(
    {"quotes": '"{text}"', "stars": "*{text}*", "repeated": "{text} {text}"}
)
"""Ways to mark a span by text alone; PASTA's stars are ``"**{text}**"``."""


def marked(prompt: TaskPrompt, mark: str = "quotes") -> TaskPrompt:
    """The prompt with its span marked in the text; ``mark`` is one of ``MARKS`` or a template.

    The span is then what it was, inside the mark; repeated, it is all of the repetition. Raises
    ValueError for a template without ``{text}``.

    >>> prompt = lk.tasks.embedded("format", 1, kind="json").prompts[0]
    >>> lk.tasks.marked(prompt).messages[0]["content"].splitlines()[0]
    '"Write the answer as JSON."'
    """
    template = MARKS.get(mark, mark)
    if "{text}" not in template:
        raise ValueError(f"mark={mark!r} must be one of {', '.join(MARKS)}, or hold '{{text}}'")
    span, (start, end) = prompt.emphasised, prompt.characters
    written = template.replace("{text}", span)
    first, last = written.index(span), written.rindex(span) + len(span)
    text = prompt.messages[prompt.emphasised_in]["content"]
    text = text[:start] + written + text[end:]
    return _moved(prompt, prompt.emphasised_in, text, start + first, written[first:last])


def few_shot(
    prompt: TaskPrompt,
    solved: Sequence[TaskPrompt],
    number: int = 3,
    *,
    seed: int = 0,
    separator: str | None = None,
) -> TaskPrompt:
    """The prompt after ``number`` examples, each with its own instruction and its correct answer.

    They are drawn from ``solved``, prompts of the train split, by the seed and the prompt: those of
    the same ``metadata["kind"]``, and never the prompt's own text. They are earlier turns of the
    conversation; with a ``separator`` (such as ``"\\n###\\n"``, for bare text) they stand in the
    message before the prompt's text instead. An example's system message goes to the beginning of
    its user message. Raises ValueError where too few are left to draw from, and with a separator
    for prompts of more than one message.

    >>> prompt = lk.tasks.embedded("format", 1, kind="json", length=(0, 0)).prompts[0]
    >>> pool = lk.tasks.embedded("format", 20, split="train", kind="json", length=(0, 0)).prompts
    >>> shown = lk.tasks.few_shot(prompt, pool, 2)
    >>> [message["role"] for message in shown.messages]
    ['user', 'assistant', 'user', 'assistant', 'user']
    """
    number = whole("number", number, 1)
    kind = prompt.metadata.get("kind")
    same = [
        each
        for each in solved
        if each.metadata.get("kind") == kind and each.messages != prompt.messages
    ]
    if len(same) < number:
        raise ValueError(
            f"number={number}: solved holds {len(same)} other prompts of kind {kind!r}; give more"
        )
    text = prompt.messages[-1]["content"]
    examples = Random(f"{seed}:{text}").sample(same, number)
    if separator is not None:
        return _in_one_message(prompt, examples, separator)
    turns: list[Mapping[str, str]] = []
    for example in examples:
        turns += [*_without_system(example.messages), assistant(example.target)]
    leading = int(prompt.messages[0]["role"] == "system")
    at = prompt.emphasised_in % len(prompt.messages)
    return replace(
        prompt,
        messages=(*prompt.messages[:leading], *turns, *prompt.messages[leading:]),
        emphasised_in=at if at < leading else at + len(turns),
    )


def _without_system(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Templates take a system message at the beginning only, and some take none."""
    first, *rest = messages
    if first["role"] != "system":
        return list(messages)
    return [user(f"{first['content']}\n{rest[0]['content']}"), *rest[1:]]


def _in_one_message(
    prompt: TaskPrompt, examples: Sequence[TaskPrompt], separator: str
) -> TaskPrompt:
    if any(len(each.messages) > 1 for each in (prompt, *examples)):
        raise ValueError(
            "separator is for prompts of one message; leave it out, and examples become turns"
        )
    solved = [(each.messages[0]["content"], each.target) for each in examples]
    joined = [f"{t}{'' if t[-1:].isspace() else ' '}{target}{separator}" for t, target in solved]
    before = "".join(joined)
    text = before + prompt.messages[0]["content"]
    return _moved(prompt, 0, text, len(before) + prompt.characters[0], prompt.emphasised)


def _moved(prompt: TaskPrompt, place: int, text: str, start: int, span: str) -> TaskPrompt:
    """The prompt with another text in a message, in which the span begins at ``start``."""
    messages = list(prompt.messages)
    messages[place] = {**messages[place], "content": text}
    nth = nth_of(text, span, start)
    return replace(prompt, messages=tuple(messages), emphasised=span, nth=nth)


def nth_of(text: str, span: str, start: int) -> int | None:
    """Which occurrence of a span begins at ``start``; None for the only one.

    Raises ValueError where none does.
    """
    if text.count(span) == 1 and text.find(span) == start:
        return None
    at = -len(span)
    for n in range(text.count(span)):
        at = text.index(span, at + len(span))
        if at == start:
            return n
    raise ValueError(f"the span {span!r} does not begin at character {start} of {text!r}")
