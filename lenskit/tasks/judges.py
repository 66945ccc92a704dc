"""Judges of answers to the tasks of PASTA (arXiv 2311.02262): as published, and mended.

A judge is a callable ``(prompt, answer) -> Verdict``; here the prompt's ``metadata`` holds
``entity``, ``label`` (the occupation) and ``context``, as ``read_task`` writes them. The published
ones are kept to compare with published numbers. What is wrong with them: ``{}`` is a format, the
label may be part of another word, and a text without pronouns, such as none at all, has changed
them all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lenskit.embedded.tasks import TaskPrompt
from lenskit.scoring import Verdict
from lenskit.tasks.words import GENDERED, NEUTRAL, SUBJECTS, words

# Words that a change of number alters too are compared by what is left of them.
_NUMBER = {"are": "is", "were": "was", "have": "has", "do": "does"}


def published_format(prompt: TaskPrompt, answer: str) -> Verdict:
    """JSON format score as published: 1 if some part of the answer, from { to }, is JSON.

    >>> prompt = lk.tasks.embedded("format", 1, kind="json").prompts[0]
    >>> lk.tasks.published_format(prompt, "Sure: {}").score
    1
    """
    found = any(True for _ in _objects(answer))
    return Verdict(int(found), "correct" if found else "ill formed")


def published_prediction(prompt: TaskPrompt, answer: str) -> Verdict:
    """JSON prediction score as published: a value of such a part contains the label.

    Only values that are texts count, in any case of letters.
    """
    label, reason = prompt.metadata["label"].lower(), "ill formed"
    for found in _objects(answer):
        reason = "wrong content"
        if any(isinstance(value, str) and label in value.lower() for value in found.values()):
            return Verdict(1, "correct")
    return Verdict(0, reason)


def judge_json(prompt: TaskPrompt, answer: str) -> Verdict:
    """The mended JSON score: an object with a name and an occupation, both of them right.

    The first object of the answer counts, whatever stands around it. Its ``name`` holds the entity
    and its ``occupation`` the label, as whole words. Reasons: "correct", "empty", "ill formed"
    (no object), "other fields", "wrong content".
    """
    if not answer.strip():
        return Verdict(0, "empty")
    found = next(_objects(answer), None)
    if found is None:
        return Verdict(0, "ill formed")
    name, occupation = found.get("name"), found.get("occupation")
    if not isinstance(name, str) or not isinstance(occupation, str):
        return Verdict(0, "other fields")
    known = prompt.metadata
    right = _holds(name, known["entity"]) and _holds(occupation, known["label"])
    return Verdict(int(right), "correct" if right else "wrong content")


def published_pronouns(prompt: TaskPrompt, answer: str) -> Verdict:
    """Pronoun score as published: 1 where no word is she or he, and so for empty text.

    Words are split by a rule; the published score takes spaCy's tokens, which differ for clitics
    written without an apostrophe.
    """
    return _without(SUBJECTS, answer)


def published_all_pronouns(prompt: TaskPrompt, answer: str) -> Verdict:
    """All-pronouns score as published: 1 where none of the eight forms of she and he is left."""
    return _without(GENDERED, answer)


def judge_pronoun_change(prompt: TaskPrompt, answer: str) -> Verdict:
    """The mended pronoun score, from 0 to 1: conversion rate × content kept.

    Conversion rate: the share of forms of they among the answer's third-person pronouns (0 without
    any, if the context has some to convert). Content kept: the share of the context's other words
    that the answer has, each as often. Reasons: "correct" (1), "empty", "pronoun left", "content
    lost", "no pronoun".
    """
    said, context = Counter(words(answer)), Counter(words(prompt.metadata["context"]))
    if not said:
        return Verdict(0, "empty")
    neutral, left = (sum(said[word] for word in forms) for forms in (NEUTRAL, GENDERED))
    if not neutral + left and any(context[word] for word in GENDERED):
        return Verdict(0, "no pronoun")
    converted = neutral / (neutral + left) if neutral + left else 1.0
    kept, whole = _content(said), _content(context)
    share = (kept & whole).total() / whole.total() if whole else 1.0
    reason = "correct"
    if left:
        reason = "pronoun left"
    elif share < 1:
        reason = "content lost"
    score = converted * share
    return Verdict(int(score) if score == 1 else score, reason)  # type: ignore[arg-type]


def judge_label(prompt: TaskPrompt, answer: str) -> Verdict:
    """1 where the answer is the target itself, as for labels that ``choose`` picked.

    Reasons: "correct", "empty", "span ignored" (it is ``otherwise``), "another label".
    """
    text = answer.strip()
    if text and text == prompt.target.strip():
        return Verdict(1, "correct")
    if not text:
        return Verdict(0, "empty")
    ignored = text == prompt.otherwise.strip()
    return Verdict(0, "span ignored" if ignored else "another label")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that begin at any { of the text."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            yield decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue


def _holds(text: str, wanted: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(wanted.lower())}(?!\w)", text.lower()) is not None


def _without(forms: frozenset[str], answer: str) -> Verdict:
    left = not forms.isdisjoint(words(answer))
    return Verdict(int(not left), "pronoun left" if left else "correct")


def _content(said: Counter[str]) -> Counter[str]:
    """The words that are no pronouns, without what singular and plural differ in."""
    found: Counter[str] = Counter()
    for word, number in said.items():
        if word not in GENDERED | NEUTRAL:
            found[_NUMBER.get(word, word).rstrip("es")] += number
    return found
