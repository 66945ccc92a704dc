"""Fluency and consistency of answers, as ROME and PASTA measure them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import log2

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from lenskit.tasks.words import tokens


def ngram_entropy(text: str, tokenize: Callable[[str], Sequence[str]] = tokens) -> float:
    """Fluency ½(⅔H₂ + 4⁄3H₃), Hₙ the entropy of a text's n-grams in bits; 0 where it has none.

    Low for repetition and for short texts. Tokens are words and punctuation marks; published
    figures are of NLTK's ``word_tokenize``, which may be given, and for CounterFact of the prompt
    and the answer together.

    >>> round(lk.tasks.ngram_entropy("tea and tea and tea and tea"), 3)
    0.981
    """
    parts = list(tokenize(text))
    return (2 / 3 * _entropy(parts, 2) + 4 / 3 * _entropy(parts, 3)) / 2


def consistency(
    answers: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[str]
) -> Float[np.ndarray, " answer"]:
    """TF-IDF cosine of each answer to the mean of its reference texts, from 0 to 1.

    ``corpus``: what the frequencies of words are counted in (published: all biographies). For
    Bias in Bios the references are biographies of the target's occupation; for CounterFact, texts
    about others of the new attribute, joined to one. 0 for an answer without words of the corpus.
    Raises ValueError where references are missing or the corpus has no words.

    >>> corpus = ["a nurse helps", "a surgeon cuts", "a poet writes"]
    >>> found = lk.tasks.consistency(["the nurse helps", ""], [corpus[:1]] * 2, corpus)
    >>> found.round(3).tolist()
    [1.0, 0.0]
    """
    if len(answers) != len(references) or not all(len(own) for own in references):
        raise ValueError(
            f"references: give each of the {len(answers)} answers a list of texts, one at least"
        )
    vectorizer = TfidfVectorizer().fit(corpus)
    told = normalize(vectorizer.transform(answers)) if len(answers) else np.zeros((0, 1))
    keys = dict.fromkeys(tuple(own) for own in references)
    means = {key: np.asarray(vectorizer.transform(key).mean(axis=0)) for key in keys}
    own = [normalize(means[tuple(each)])[0] for each in references]
    return np.array([float((told[i] @ own[i])[0]) for i in range(len(answers))])


def _entropy(parts: Sequence[str], n: int) -> float:
    counts = Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))
    total = counts.total()
    return -sum(c / total * log2(c / total) for c in counts.values())
