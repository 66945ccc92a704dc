from __future__ import annotations

from math import log2

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from lenskit.tasks import consistency, ngram_entropy

CORPUS = ["A nurse helps the sick.", "The surgeon helps and cuts.", "A poet writes of the sea."]


def test_fluency_is_the_weighted_entropy_of_pairs_and_triples():
    # Pairs: ab twice, bb, ba; triples: abb, bba, bab once each.
    pairs = -(2 * 0.25 * log2(0.25) + 0.5 * log2(0.5))
    assert ngram_entropy("a b b a b") == pytest.approx((2 / 3 * pairs + 4 / 3 * log2(3)) / 2)
    # Different words all through: n tokens have n - 1 pairs and n - 2 triples.
    assert ngram_entropy("a b c d, e") == pytest.approx((2 / 3 * log2(5) + 4 / 3 * log2(4)) / 2)


def test_repetition_and_empty_text_have_no_entropy():
    assert [ngram_entropy(text) for text in ("", "tea", "tea tea tea tea", "a b")] == [0.0] * 4


def test_tokens_may_be_anybodys():
    assert ngram_entropy("abbab", tokenize=list) == ngram_entropy("a b b a b")


def test_consistency_is_the_tfidf_cosine_to_the_mean_of_the_references():
    answers = ["The nurse writes.", "A surgeon.", "zebra", ""]
    references = [CORPUS[:2], CORPUS[1:2], CORPUS, CORPUS]
    found = consistency(answers, references, CORPUS)
    known = TfidfVectorizer().fit(CORPUS)
    for value, answer, own in zip(found[:2], answers, references, strict=False):
        a, b = known.transform([answer]).toarray()[0], known.transform(own).toarray().mean(0)
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found[2:].tolist() == [0.0, 0.0]
    assert consistency(CORPUS, [[text] for text in CORPUS], CORPUS) == pytest.approx([1, 1, 1])


def test_every_answer_needs_a_reference():
    for references in ([CORPUS], [CORPUS, []]):
        with pytest.raises(ValueError, match="references: give each of the 2 answers"):
            consistency(["a", "b"], references, CORPUS)
