"""Words of a text, and the pronouns among them; a text told again with «they»."""

from __future__ import annotations

import re

SUBJECTS = frozenset({"she", "he"})
GENDERED = frozenset("she he her him hers his herself himself".split())
NEUTRAL = frozenset("they them their theirs themselves themself".split())

_SAME = {"she": "they", "he": "they", "him": "them", "hers": "theirs"}
_SAME |= {"herself": "themselves", "himself": "themselves"}
_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "isn't": "aren't"}
_VERBS |= {"wasn't": "weren't", "hasn't": "haven't", "doesn't": "don't"}
# What follows a pronoun and ends in -s without being a verb.
_NO_VERBS = frozenset("always perhaps sometimes nowadays besides thus previously as".split())
# After these words «her» is nobody's: «told her that», «with her in».
_AFTER_OBJECT = frozenset(
    "a about after again also although an and as at back because before but by during for from how "
    "if in into it not of off on or out over she he so than that the they this through to too "
    "until up was were what when where which while who why with without".split()
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, apostrophes and hyphens between them: she's is she, s."""
    return re.findall(r"[^\W_]+", text.lower())


def tokens(text: str) -> list[str]:
    """Words and punctuation marks, a token each."""
    return re.findall(r"\w+|[^\w\s]", text)


def with_they(text: str) -> str:
    """The text with forms of «they» for those of «she» and «he», and with the verbs after them.

    Whole words only, each replaced once; a verb is changed where it follows its pronoun. «his» and
    «her» are read from the word behind them, which a rule of thumb cannot always do right.

    >>> lk.tasks.with_they("She loves her cat, and he gave her the keys himself.")
    'They love their cat, and they gave them the keys themselves.'
    """
    parts = re.split(r"(\w+(?:['’]\w+)?)", text)
    for i in range(1, len(parts), 2):
        word, behind = parts[i], parts[i + 1]
        follower = parts[i + 2] if i + 2 < len(parts) and behind.isspace() else ""
        stem, mark, ending = word.replace("’", "'").partition("'")
        new = _replacement(stem.lower(), follower.lower())
        if new is None:
            continue
        if mark and stem.lower() in SUBJECTS:
            is_or_has = "ve" if follower.lower() in ("been", "got", "had") else "re"
            new += "'" + (is_or_has if ending.lower() == "s" else ending)
        parts[i] = new.capitalize() if stem[0].isupper() else new
        if not mark and stem.lower() in SUBJECTS and follower:
            parts[i + 2] = _plural(follower)
    return "".join(parts)


def _replacement(word: str, follower: str) -> str | None:
    if word in ("her", "his"):
        owned = follower and follower not in _AFTER_OBJECT | GENDERED | NEUTRAL
        return "their" if owned else {"her": "them", "his": "theirs"}[word]
    return _SAME.get(word)


def _plural(verb: str) -> str:
    """The verb as it follows «they»; other words as they are."""
    low = verb.lower()
    if low in _VERBS:
        return _VERBS[low]
    if (
        low in _NO_VERBS
        or not low.endswith("s")
        or low.endswith(("ss", "us", "'s"))
        or len(low) < 4
    ):
        return verb
    if low.endswith("ies"):
        return verb[:-3] + "y"
    return verb[:-2] if low.endswith(("ches", "shes", "sses", "xes", "oes", "zzes")) else verb[:-1]
