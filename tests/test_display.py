"""Objects print as one short table, in a terminal and in a notebook."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace

import pandas as pd
import pytest
import torch
from steered import random_vectors

import lenskit as lk
from lenskit.models import pad_left

LINES, CHARACTERS = 15, 1500
EVIL = "<script>alert('x')</script> & \x1b[31m\nred \ud800"


@pytest.fixture(scope="module")
def shown(model):
    """One of each, with texts that a page must not take for its own."""
    concept = lk.Concept(EVIL, EVIL, EVIL, (EVIL,) * 30)
    fears = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, fears, number=8, layout="paired")
    capture = lk.capture(model, prompts, progress=False)
    tokens = lk.select_tokens(capture)
    vectors = replace(random_vectors(model), concept=concept, learner=EVIL)
    enrichment = lk.enrich(model, prompts, tokens, draws=199, progress=False)
    study = {"concept_class": "fears", "concept": EVIL[:-1], "token": "attention", "labels": "soft"}
    study |= {"learner": "rfm", "blocks": "all", "control": "", "coefficient": 0.1}
    study |= {"question": EVIL[:-1], "answer": EVIL[:-1], "score": 1, "reason": "on concept"}
    return [
        *(prompts, capture, prompts.tokens, tokens, vectors, vectors * 2, enrichment),
        *(lk.rank_stability(enrichment, enrichment), lk.model_report(model), concept),
        *(lk.concepts["fears"], lk.Variant(), lk.SteeringRow(EVIL, vectors, 0.1, EVIL)),
        *(lk.Study(pd.DataFrame([study] * 5)), lk.recipes["paper"], lk.Verdict(0, "unfinished")),
        lk.steerability(torch.eye(3)),
        lk.Answer(EVIL, finished=True, token_ids=[1, 2]),
        lk.HeadScores((EVIL,), torch.rand(1, 2, 3, 4), torch.rand(1, 2), "heads", EVIL, EVIL, 9),
    ]


def huge(model):
    """The same kinds with thousands of entries on every axis."""
    prompts, blocks, candidates = 2000, 300, 40
    names = tuple(f"<{i}>" * 50 for i in range(candidates))
    concept = lk.Concept("be " * 5000, "long " * 300, "class " * 300, ("why? " * 500,) * 300)
    ids = pad_left([[0] * 100 + list(range(candidates))] * prompts, 5)
    half = torch.arange(prompts) % 2 == 0
    mask = torch.zeros_like(ids.input_ids, dtype=torch.bool)
    pair = torch.arange(prompts) ^ 1
    told = lk.PromptSet(concept, ids, mask, half, names, ("so " * 500,) * prompts, pair)
    mass = torch.rand(1, blocks, 1, candidates).expand(prompts, -1, 16, -1)
    resid = torch.zeros(1, 1, 1, 1).expand(prompts, blocks, candidates, 4096)
    selection = lk.TokenSelection(torch.arange(blocks) % candidates, names, "rule " * 500)
    vectors = replace(
        random_vectors(model),
        directions=torch.randn(blocks, 64),
        validation=torch.rand(blocks),
        resid_norm=torch.rand(blocks),
        concept=concept,
        learner="learner " * 500,
    )
    p_values = torch.rand(1, blocks, 4, candidates).expand(1000, -1, -1, -1)
    smallest = torch.full((1000, candidates), 0.001)
    members = [replace(concept, name=f"c{i}") for i in range(1000)]
    return [
        *(told, lk.Capture(told, mass, resid, "m" * 500), ids, selection, vectors, concept),
        sum(replace(vectors, learner=f"{i}") for i in range(40)),
        lk.Enrichment(p_values, smallest, selection, "keys", 0.01),
        type(lk.concepts["fears"])("name " * 200, "prefix " * 200, concept.questions, members),
        lk.SteeringRow("why? " * 500, vectors, 0.1, "be " * 500),
        lk.HeadScores(
            tuple(f"task {i} " * 300 for i in range(40)),
            torch.rand(40, 2, blocks, candidates),
            torch.rand(40, 2),
            *("heads", "policy " * 300, "m" * 500, 9),
        ),
    ]


def test_whatever_its_size_an_object_prints_in_a_few_lines(model, shown):
    for one in (*shown, *huge(model)):
        if isinstance(one, str):
            continue  # an answer prints as the text that it is
        text = repr(one)
        assert len(text) <= CHARACTERS and len(text.splitlines()) <= LINES, text
        assert all(line.isprintable() for line in text.split("\n"))
        page = one._repr_html_()
        assert len(re.sub(r"<[^>]*>", "", page)) <= 2 * CHARACTERS and page.count("<tr>") < LINES


def test_a_notebook_shows_tables_with_every_text_escaped_in_the_colours_of_the_page(shown):
    for one in shown:
        page = one._repr_html_()
        assert page.startswith("<table>") and page.endswith("</table>")
        assert "<script" not in page and "\x1b" not in page and "color" not in page
        assert set(re.findall(r"</?(\w+)", page)) <= {"table", "caption", "tr", "th", "td"}
        page.encode()
    assert "&lt;script&gt;" in shown[4]._repr_html_()


def test_every_public_class_of_results_has_such_a_table():
    classes = [one for name in lk.__all__ if isinstance(one := getattr(lk, name), type)]
    results = [one for one in classes if is_dataclass(one)]
    for one in (*results, lk.ConceptClass, lk.Answer):
        assert callable(getattr(one, "_repr_html_", None)), one
    assert len(results) >= 14


def test_tables_name_axes_and_the_numbers_that_matter(shown):
    prompts, capture, _, tokens, vectors, twice, enrichment, *_ = map(repr, shown)
    assert capture.startswith("Capture of 'spiders', 8 prompts\n")
    assert "prompt 8 × layer 3 × head 4 × candidate 5" in capture
    assert "with it        4 prompts" in prompts and "pairs          4" in prompts
    assert "candidates" in tokens and re.search(r"tokens +0", tokens)
    assert "layer 3 × d_model 32" in vectors and "correlation 0" in vectors
    assert "+2 × " in twice and "norms   2" in twice
    best = shown[6].ranking[0]
    assert f"most enriched  {best} ({shown[6].scores[best]:.3g})" in enrichment
    assert "5 concept classes" in repr(lk.concepts)


def test_equality_hashes_and_the_short_lines_of_small_classes_stay():
    one = lk.Concept("Be glad.", questions=("Why?",))
    assert one == lk.Concept("Be glad.", questions=("Why?",)) != lk.Concept("Be sad.")
    assert hash(one) == hash(replace(one))
    assert repr(lk.Verdict(1, "on concept")) == "Verdict(score=1, reason='on concept')"
    assert repr(lk.Variant()).startswith("Variant(token='attention'")
    assert [field.name for field in fields(one)][0] == "prefix"
    assert not [name for name in dir(one) if not name.startswith("_") and "repr" in name]


def test_unknown_validation_and_prompts_without_a_prefix_are_told_too(model):
    unknown = replace(random_vectors(model), validation=torch.full((3,), float("nan")))
    assert "correlation unknown" in repr(unknown)
    prompts = lk.build_prompts(model, lk.Concept("Take on a cheerful mood."), number=4)
    plain = lk.capture(model, prompts, progress=False).rows(~prompts.has_prefix)
    assert "nan" in repr(plain) and "with it        0 prompts" in repr(plain.prompts)
    assert "prompt 0" in repr(prompts.tokens.rows([]))
