from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import pandas as pd
import pytest
import tiny
import torch

from lenskit.capture import capture
from lenskit.concepts import Concept, concepts, question_prompt
from lenskit.enrichment import enrich
from lenskit.generation import generate
from lenskit.labels import hard_labels, soft_labels
from lenskit.prompts import build_prompts
from lenskit.scoring import Verdict, phrase_judge, steerability
from lenskit.selector import fixed_token, select_tokens
from lenskit.steering import steer
from lenskit.study import (
    CONTROLS,
    Study,
    Variant,
    answers,
    finished,
    read_study,
    run_study,
    study_concept,
    variants,
)
from lenskit.study.bench import _balanced, _shuffled, own_seed
from lenskit.study.cells import CellStore
from lenskit.study.engine import CellsFailed
from lenskit.study.study import KEYS
from lenskit.vectors import MeanDifference, SoftCovariance, fit_vectors

SPIDERS, CHEERFUL = concepts["fears"]["spiders"], concepts["moods"]["cheerful"]
BOTH = (SPIDERS, CHEERFUL)
COEFFICIENTS = (0.25, 1.5)
WAYS = variants(learners=("mean difference",), labels=("hard",))
COLUMNS = [
    *("concept_class", "concept", "token", "labels", "learner", "blocks", "control"),
    *("coefficient", "question", "answer", "score", "reason"),
]


class Stopped(Exception):
    pass


class Counting:
    """A judge that scores an answer by its text alone, counts, and falls over when told to."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.falls_at: str | None = None

    identity = "by the text alone"

    def __call__(self, concept: Concept, question: str, answer: str) -> Verdict:
        if concept.name == self.falls_at:
            raise Stopped
        self.seen[concept.name] += 1
        score = sum(map(ord, answer + question)) % 2
        return Verdict(score, "on concept" if score else "off concept")


def options(**changes):
    settings = {
        "coefficients": COEFFICIENTS,
        "prompts": 24,
        "judge": Counting(),
        "max_new_tokens": 6,
        "progress": False,
    }
    return settings | changes


@pytest.fixture(scope="module")
def study(model) -> Study:
    return run_study(model, BOTH, WAYS, **options())


def answers_of(study: Study, concept: Concept, **wanted) -> pd.DataFrame:
    table = study.answers[study.answers.concept == concept.name]
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def vectors_of(model, concept, *, token="attention", labels="hard", learner=MeanDifference):
    """The same vectors, made by the steps of the method one by one."""
    seen = capture(model, build_prompts(model, concept, number=24), progress=False)
    tokens = select_tokens(seen) if token == "attention" else fixed_token(seen, int(token))
    made = hard_labels(seen, tokens) if labels == "hard" else soft_labels(seen, tokens)
    return fit_vectors(seen, tokens, made, learner=learner(), progress=False)


def test_a_study_is_a_tidy_table_with_a_row_for_each_answer(study):
    table = study.answers
    assert list(table.columns) == COLUMNS
    steered = 3 * len(COEFFICIENTS)  # the variant and two controls; two more have none to choose
    assert len(table) == 2 * (steered + 2) * 5
    assert not table.duplicated([*COLUMNS[:9]]).any()
    assert not table.isna().any().any()
    assert set(table.score) <= {0, 1}
    found = table[["concept_class", "concept"]].drop_duplicates().values.tolist()
    assert found == [["fears", "spiders"], ["moods", "cheerful"]]
    for concept in BOTH:
        assert set(answers_of(study, concept).question) == set(concept.questions)


def test_every_control_is_run_on_every_question(study):
    for concept, control in product(BOTH, CONTROLS):
        rows = answers_of(study, concept, control=control)
        still = control in ("unsteered", "prompted")
        assert sorted(set(rows.coefficient)) == ([0.0] if still else list(COEFFICIENTS))
        assert len(rows) == 5 * (1 if still else 2)


@pytest.mark.parametrize("concept", BOTH, ids=lambda concept: concept.name)
def test_unsteered_and_prompted_answers_are_the_models_own(model, study, concept):
    for control, prefix in (("unsteered", ""), ("prompted", concept.prefix)):
        rows = answers_of(study, concept, control=control)
        asked = [question_prompt(question, prefix) for question in rows.question]
        assert list(rows.answer) == generate(model, asked, max_new_tokens=6)


@pytest.mark.parametrize("concept", BOTH, ids=lambda concept: concept.name)
def test_steered_answers_equal_those_of_the_steps_taken_one_by_one(model, study, concept):
    vectors = vectors_of(model, concept)
    for coefficient in COEFFICIENTS:
        rows = answers_of(study, concept, control="", coefficient=coefficient)
        with steer(model, vectors, coefficient=coefficient, relative=True):
            assert list(rows.answer) == generate(model, list(rows.question), max_new_tokens=6)


def test_steering_and_its_random_and_shuffled_controls_differ(study):
    for concept in BOTH:
        texts = [
            tuple(answers_of(study, concept, control=control, coefficient=1.5).answer)
            for control in ("", "random vector", "shuffled labels")
        ]
        assert len(set(texts)) == 3


def test_token_labels_and_blocks_of_a_variant_are_those_it_names(model):
    ways = (
        Variant("-2", "hard", "mean difference", "0,2"),
        Variant("attention", "soft", "covariance", "top1"),
        Variant("attention", "hard", "mean difference", "bottom2"),
        Variant("attention", "hard", "mean difference", "random1"),
    )
    rows = study_concept(
        model, SPIDERS, ways, coefficients=(1.5,), prompts=24, judge=Counting(), max_new_tokens=6
    )
    assert len(rows) == 4 * 5
    paired = build_prompts(model, SPIDERS, number=24, layout="paired")
    seen = capture(model, build_prompts(model, SPIDERS, number=24), progress=False)
    found = enrich(model, paired, select_tokens(seen), progress=False)
    own = vectors_of(model, SPIDERS)
    expected = {
        "0,2": (vectors_of(model, SPIDERS, token="-2"), (0, 2)),
        "top1": (vectors_of(model, SPIDERS, labels="soft", learner=SoftCovariance), found.top(1)),
        "bottom2": (own, found.bottom(2)),
        "random1": (own, found.random(1, seed=own_seed(SPIDERS, 0))),
    }
    for spec, (vectors, blocks) in expected.items():
        own_rows = [row for row in rows if row["blocks"] == spec]
        with steer(model, vectors, coefficient=1.5, blocks=blocks, relative=True):
            asked = [row["question"] for row in own_rows]
            assert [row["answer"] for row in own_rows] == generate(model, asked, max_new_tokens=6)


def test_a_variant_gives_the_same_answers_whatever_runs_beside_it(model, study):
    rows = study_concept(
        model,
        SPIDERS,
        WAYS[:1],
        coefficients=COEFFICIENTS[1:],
        prompts=24,
        judge=Counting(),
        max_new_tokens=6,
        batch_size=2,
    )
    beside = answers_of(study, SPIDERS, control="", coefficient=1.5)
    assert [row["answer"] for row in rows] == list(beside.answer)


def test_the_concepts_table_holds_both_figures_of_steerability(study):
    table = study.concepts
    assert len(table) == 2 * len(WAYS)
    assert (table.best >= table.held_out).all()
    assert table.best.between(0, 1).all() and table.held_out.between(0, 1).all()
    for concept, way in product(BOTH, WAYS):
        rows = answers_of(study, concept, **asdict(way))
        own = sorted(set(rows.coefficient))
        scores = [
            [int(rows[(rows.coefficient == c) & (rows.question == q)].score.item()) for q in qs]
            for c in own
            for qs in [concept.questions]
        ]
        expected = steerability(torch.tensor(scores), own)
        found = table[(table.concept == concept.name) & (table.control == way.control)].iloc[0]
        assert found.best == pytest.approx(expected.best)
        assert found.held_out == pytest.approx(expected.held_out)
        assert found.coefficient == own[expected.coefficient]


def test_comparing_takes_means_and_standard_errors_over_concepts(study):
    table = study.compare()
    assert list(table.columns) == [*KEYS, "best", "held_out", "best ±", "held_out ±", "concepts"]
    assert len(table) == len(WAYS) and set(table.concepts) == {2}
    for _, row in table.iterrows():
        own = study.concepts[study.concepts.control == row.control]
        assert row.best == pytest.approx(own.best.mean())
        a, b = own.held_out
        assert row["held_out ±"] == pytest.approx(abs(a - b) / 2)  # of two: s / √2
    by_control = study.compare(["control"])
    assert list(by_control.control) == ["", *CONTROLS]


def test_a_study_that_was_stopped_goes_on_and_gives_the_identical_table(model, study, tmp_path):
    judge = Counting()
    judge.falls_at = CHEERFUL.name
    with pytest.raises(CellsFailed, match=r"5 cells failed: Stopped: \(moods, cheerful, .* 4 more"):
        run_study(model, BOTH, WAYS, out=tmp_path, **options(judge=judge))
    finished = judge.seen[SPIDERS.name]
    assert finished == len(answers_of(study, SPIDERS)) and not judge.seen[CHEERFUL.name]

    again = Counting()
    resumed = run_study(model, BOTH, WAYS, out=tmp_path, **options(judge=again))
    assert again.seen == {CHEERFUL.name: finished}
    pd.testing.assert_frame_equal(resumed.answers, study.answers)
    pd.testing.assert_frame_equal(resumed.concepts, study.concepts)

    # A third time nothing is left to do, and other batches are no other settings.
    read = Counting()
    third = run_study(model, BOTH, WAYS, out=tmp_path, **options(judge=read), batch_size=3)
    assert not read.seen
    pd.testing.assert_frame_equal(third.answers, study.answers)


def test_a_study_with_a_phrase_judge_made_anew_goes_on(model, tmp_path):
    for _ in range(2):
        settings = options(coefficients=(1.0,), judge=phrase_judge({SPIDERS.name: ["web"]}))
        found = run_study(model, [SPIDERS], WAYS[:1], out=tmp_path, **settings)
        assert len(found.answers) == 5


def test_settings_said_in_other_words_are_the_same_settings(model, tmp_path):
    given = options(coefficients=(1.0,), judge=Counting())
    run_study(model, [SPIDERS], WAYS[:1], out=tmp_path, **given)
    again = options(coefficients=[1.0], judge=Counting()) | {"relative": True, "seed": 0}
    run_study(model, [SPIDERS], WAYS[:1], out=tmp_path, **again)
    assert not again["judge"].seen


def test_a_concept_with_other_questions_is_asked_anew(model, tmp_path):
    for questions in (SPIDERS.questions, ("Who?", "Why?", "Where?")):
        judge, concept = Counting(), replace(SPIDERS, questions=questions)
        settings = options(coefficients=(1.0,), judge=judge)
        found = run_study(model, [concept], WAYS[:1], out=tmp_path, **settings)
        assert list(found.answers.question) == list(questions)
        assert judge.seen == {SPIDERS.name: len(questions)}


def test_the_model_is_as_it_was_after_a_study_that_fell_over(model, study):
    judge = Counting()
    judge.falls_at = SPIDERS.name
    with pytest.raises(CellsFailed) as caught:
        run_study(model, [SPIDERS], WAYS, **options(judge=judge))
    assert isinstance(caught.value.__cause__, Stopped)
    with pytest.raises(Stopped):
        settings = options(judge=judge)
        del settings["progress"]
        study_concept(model, SPIDERS, WAYS, **settings)
    rows = answers_of(study, SPIDERS, control="unsteered")
    assert list(rows.answer) == generate(model, list(rows.question), max_new_tokens=6)


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """A folder that holds a study of one concept."""
    folder = tmp_path_factory.mktemp("study")
    run_study(model, [SPIDERS], WAYS[:2], out=folder, **options(coefficients=(1.0,)))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": (2.0,)},
        {"prompts": 26},
        {"max_new_tokens": 7},
        {"seed": 1},
        {"relative": False},
        {"judge": len},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_folder_of_a_study_with_other_settings_is_refused(model, kept, changes):
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(ValueError, match="holds a study with other settings"):
        settings = options(coefficients=(1.0,)) | changes
        run_study(model, [SPIDERS], WAYS[:2], out=kept, **settings)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_folder_of_a_study_with_other_variants_or_another_model_is_refused(model, kept):
    for who, ways in ((model, WAYS[:3]), (tiny.shared_model("llama"), WAYS[:2])):
        with pytest.raises(ValueError, match="holds a study with other settings"):
            run_study(who, [SPIDERS], ways, out=kept, **options(coefficients=(1.0,)))


def test_a_study_keeps_plain_json_and_leaves_nothing_half_written(kept):
    files = sorted(path.name for path in kept.iterdir())
    assert len(files) == 2 and not any(name.endswith(".tmp") for name in files)
    for path in kept.iterdir():
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line)


def test_a_study_shows_its_progress_without_disturbing_the_bars_of_its_steps(model):
    settings = options(coefficients=(1.0,), progress=True)
    assert len(run_study(model, [SPIDERS], WAYS[:1], **settings).answers) == 5


def test_concepts_that_cannot_be_told_apart_or_tested_are_refused(model):
    one = Concept("Take on a shy mood.", "shy", questions=SPIDERS.questions)
    for wrong in ([], [SPIDERS, SPIDERS], [one, replace(one, concept_class="custom")]):
        with pytest.raises(ValueError, match="concepts must be at least one, and differ"):
            run_study(model, wrong, WAYS, **options())
    with pytest.raises(ValueError, match="'custom' has 0 questions"):
        run_study(model, [Concept("Take on a shy mood.")], WAYS, **options())


def test_variants_are_all_combinations_and_the_controls_of_the_first():
    found = variants(tokens=("attention", -1), labels=("soft", "hard"), controls=("unsteered",))
    assert len(found) == len(set(found)) == 5
    assert {(v.token, v.labels) for v in found[:4]} == set(
        product(("attention", "-1"), ("soft", "hard"))
    )
    assert found[4] == Variant("attention", "soft", "covariance", "all", "unsteered")
    assert [v.control for v in variants()] == ["", *CONTROLS]
    with pytest.raises(ValueError, match="at least one choice"):
        variants(learners=())


def test_shuffled_labels_of_few_prompts_still_vary_in_both_parts():
    labels = torch.tensor([0.0, 1.0] * 5)[:, None].repeat(1, 3)
    for seed in range(50):
        drawn = _shuffled(labels, torch.Generator().manual_seed(seed))
        assert drawn[:8].unique().tolist() == drawn[8:].unique().tolist() == [0, 1]
        assert torch.equal(drawn.sort(dim=0).values, labels.sort(dim=0).values)


def test_balanced_labels_are_as_high_with_the_prefix_as_without():
    prefixed = torch.arange(24) % 2 == 0
    for labels in (prefixed.float()[:, None].expand(-1, 3), torch.rand(24, 3) * prefixed[:, None]):
        drawn = _balanced(labels, prefixed, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn.sort(0).values, labels.sort(0).values)
        difference = drawn[prefixed].sum(0) - drawn[~prefixed].sum(0)
        # What is dealt in pairs of neighbours differs by no more than the highest label.
        assert bool((difference.abs() <= labels.amax(0)).all())
        if bool(((labels == 0) | (labels == 1)).all()):
            assert bool((difference == 0).all())
        same = _balanced(labels, prefixed, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn, same)


def table(study: Study) -> str:
    return study.answers.to_csv(index=False)


def test_concepts_whose_names_a_file_system_would_confuse_are_kept_apart(model, tmp_path):
    names = ("a/b", "a-b", "a.b", "../a", "x" * 300, "ö" * 200, "CON", "a\x00b", "\ud800", "A/B")
    chosen = [replace(SPIDERS, name=name) for name in names]
    chosen += [replace(CHEERFUL, concept_class=None), replace(CHEERFUL, concept_class="a/b")]
    settings = options(coefficients=(1.0,), max_new_tokens=2)
    way = replace(WAYS[0], control="unsteered")
    alone = [run_study(model, [one], way, out=tmp_path, **settings) for one in chosen]
    again = run_study(model, chosen, way, out=tmp_path, **settings)
    shown = [name.replace("\ud800", r"\ud800") for name in names]
    assert list(again.answers.concept.unique()) == [*shown, "cheerful"]
    assert table(again) == table(Study(pd.concat([one.answers for one in alone])))
    # Of no class and of the class "custom": two concepts, though no table could tell them apart.
    custom = replace(CHEERFUL, concept_class="custom")
    judge = Counting()
    run_study(model, custom, way, out=tmp_path, **settings | {"judge": judge})
    assert sum(judge.seen.values()) == 5


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_half_written_file_is_done_again_with_the_identical_table(model, study, tmp_path, kept):
    run_study(model, BOTH, WAYS, out=tmp_path, batch_size=8, **options())
    (file,) = tmp_path.glob("cells-*.jsonl")
    assert len(file.read_bytes().splitlines()) == 2  # a line for each concept
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    found = finished(tmp_path, BOTH)
    assert found == ([SPIDERS] if kept == 0.9 else [])
    with pytest.raises(ValueError, match="does not hold .*cheerful yet"):
        read_study(tmp_path, BOTH)
    again = run_study(model, BOTH, WAYS, out=tmp_path, batch_size=8, **options())
    assert table(again) == table(study) == table(read_study(tmp_path, BOTH))


def test_a_redefined_judge_or_learner_does_not_get_the_old_scores(model, tmp_path):
    def judge_of(score):
        return lambda concept, question, answer: score

    class Rubric:
        def __init__(self, rubric, budget):
            self.rubric, self.identity = rubric, {"rubric": rubric}
            self.budget = budget

        def __call__(self, concept, question, answer):
            return len(self.rubric) % 2

    def learner(sign):
        return lambda: lambda X, y, X_val, y_val: sign * X[0]

    for name, judges in {
        "lambda": [judge_of(0), judge_of(1)],
        "partial": [partial(len, ""), partial(max, "")],
        "rubric": [Rubric("a", 1), Rubric("bb", 1)],
    }.items():
        folder = tmp_path / name
        settings = options(coefficients=(1.0,), judge=judges[0], max_new_tokens=2)
        if name == "partial":
            settings["judge"] = partial(judged, 1)
            judges = [partial(judged, 1), partial(judged, 0)]
        run_study(model, SPIDERS, WAYS[:1], out=folder, **settings)
        run_study(model, SPIDERS, WAYS[:1], out=folder, **settings)
        with pytest.raises(ValueError, match=r"other settings \(they differ in options.judge"):
            run_study(model, SPIDERS, WAYS[:1], out=folder, **settings | {"judge": judges[1]})
    spent = settings | {"judge": Rubric("a", 99)}
    assert len(run_study(model, SPIDERS, WAYS[:1], out=tmp_path / "rubric", **spent).answers) == 5

    way = replace(WAYS[0], learner="mine")
    settings = options(coefficients=(1.0,), max_new_tokens=2)
    mine = settings | {"learners": {"mine": learner(1), "unused": learner(2)}}
    run_study(model, SPIDERS, way, out=tmp_path / "learner", **mine)
    mine["learners"]["unused"] = learner(3)
    run_study(model, SPIDERS, way, out=tmp_path / "learner", **mine)
    with pytest.raises(ValueError, match="differ in options.learners.mine"):
        mine["learners"]["mine"] = learner(-1)
        run_study(model, SPIDERS, way, out=tmp_path / "learner", **mine)


def judged(score, concept, question, answer):
    return score


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"promts": 3}, TypeError),
        ({"judge": "grammar"}, TypeError),
        ({"coefficients": ()}, ValueError),
        ({"coefficients": (float("nan"),)}, ValueError),
        ({"max_new_tokens": 0}, ValueError),
        ({"learners": {"ridge": object}}, ValueError),
    ],
    ids=lambda wrong: str(wrong),
)
def test_settings_are_checked_before_they_are_written(model, tmp_path, wrong, error):
    with pytest.raises(error):
        run_study(model, SPIDERS, WAYS, out=tmp_path / "new", **options() | wrong)
    assert not (tmp_path / "new").exists()


def test_a_variant_that_fails_takes_no_other_with_it(model, study, tmp_path):
    def broken(X, y, X_val, y_val):
        raise ArithmeticError("no direction at all")

    ways = (*WAYS, replace(WAYS[0], learner="broken"), replace(WAYS[0], blocks="0,99"))
    learners = {"mean difference": MeanDifference, "broken": lambda: broken}
    with pytest.raises(CellsFailed) as caught:
        run_study(model, BOTH, ways, out=tmp_path, **options(learners=learners))
    assert len(caught.value.failures) == 4
    for said in ("ArithmeticError: no direction at all", "'0,99' must be among 0 to", "1 more"):
        assert said in str(caught.value)
    assert len(CellStore.existing(tmp_path).cells) == 2 * len(WAYS)


def test_answers_that_are_no_numbers_fail_alone(model, study, monkeypatch):
    generate_steered = answers.generate_steered

    def overflows(model, rows, **settings):
        if any(row.coefficient == 1.5 and row.prefix == "" for row in rows):
            raise ValueError("the model's logits are not numbers")
        return generate_steered(model, rows, **settings)

    monkeypatch.setattr(answers, "generate_steered", overflows)
    with pytest.raises(CellsFailed) as caught:
        run_study(model, SPIDERS, WAYS, **options())
    assert {key[6] for key in caught.value.failures} == {"", "random vector", "shuffled labels"}


def test_concepts_and_variants_with_other_blocks_share_batches(model, study, monkeypatch):
    calls = []
    generate_steered = answers.generate_steered

    def counted(model, rows, **settings):
        calls.append(len(rows))
        return generate_steered(model, rows, **settings)

    monkeypatch.setattr(answers, "generate_steered", counted)
    ways = (*WAYS, replace(WAYS[0], blocks="0,2"), replace(WAYS[0], blocks="1"))
    found = run_study(model, BOTH, ways, **options())
    assert calls == [len(found.answers)]
    for concept in BOTH:
        for way in WAYS:
            wanted = {"control": way.control, "blocks": way.blocks}
            one, other = (answers_of(each, concept, **wanted) for each in (found, study))
            assert list(one.answer) == list(other.answer)
