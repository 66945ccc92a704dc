from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.concepts import Concept, concepts, question_prompt
from lenskit.embedded.grammar import load_grammar
from lenskit.generation import Answer
from lenskit.scoring import (
    Steerability,
    Verdict,
    fluency,
    grammar_judge,
    phrase_judge,
    repetition,
    steerability,
)

TEA = Concept(prefix="Personify someone who loves tea.", name="tea", questions=("What now?",))


def brute_force(table, coefficients, chosen_on):
    """Steerability by its definition, in plain Python."""
    rows, columns = range(len(table)), range(len(table[0]))

    def chosen(questions):
        best = max(fmean(table[r][q] for q in questions) for r in rows)
        equal = [r for r in rows if fmean(table[r][q] for q in questions) == best]
        return min(equal, key=lambda r: abs(coefficients[r]))

    held_out = []
    for picked in combinations(columns, chosen_on):
        rest = [q for q in columns if q not in picked]
        held_out.append(fmean(table[chosen(picked)][q] for q in rest))
    best = fmean(max(table[r][q] for r in rows) for q in columns)
    return best, fmean(held_out), chosen(columns)


@st.composite
def tables(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    row = st.lists(st.integers(0, 1), min_size=columns, max_size=columns)
    table = draw(st.lists(row, min_size=rows, max_size=rows))
    sizes = st.integers(-40, 40).filter(bool)
    unique = draw(st.lists(sizes, min_size=rows, max_size=rows, unique_by=abs))
    return table, [size / 8 for size in unique], draw(st.integers(1, columns - 1))


@settings(deadline=None, max_examples=150)
@given(tables())
def test_steerability_equals_a_brute_force(case):
    table, coefficients, chosen_on = case
    found = steerability(torch.tensor(table), coefficients, chosen_on=chosen_on)
    best, held_out, coefficient = brute_force(table, coefficients, chosen_on)
    assert found.best == pytest.approx(best)
    assert found.held_out == pytest.approx(held_out)
    assert found.coefficient == coefficient
    assert found.held_out <= found.best + 1e-12


def test_of_equal_coefficients_the_smallest_in_size_is_chosen():
    # Two questions choose between rows that are equal on them and differ on the third.
    scores = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 1, 0]])
    assert steerability(scores, [-3, 0.5, 2]).coefficient == 1
    assert steerability(scores, [0.5, -3, 2]).coefficient == 1  # best over all three
    assert steerability(scores, [0.1, 3, 2]).held_out == pytest.approx((0 + 1 + 1) / 3)
    assert steerability(scores, [2, -0.1, 3]).held_out == 1
    # Without coefficients the order of the rows is their size.
    assert steerability(torch.ones(3, 3)) == Steerability(1.0, 1.0, 0)


def test_the_optimistic_figure_is_above_the_honest_one_where_questions_disagree():
    found = steerability(torch.eye(5))
    assert found.best == 1
    assert found.held_out == 0


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(5), {}, "table"),
        (torch.ones(0, 5), {}, "table"),
        (torch.tensor([[1.0, math.nan, 1.0]]), {}, "without NaN"),
        (torch.ones(3, 2), {}, "chosen_on=2 of 2 questions leaves none"),
        (torch.ones(3, 5), {"chosen_on": 0}, "chosen_on=0"),
        (torch.ones(3, 5), {"chosen_on": 5}, "chosen_on=5 of 5"),
        (torch.ones(3, 5), {"coefficients": [1, 2]}, "coefficients are 2, scores have 3 rows"),
    ],
)
def test_a_table_that_has_no_steerability_is_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        steerability(scores, **options)


def test_the_grammar_judge_scores_what_the_grammar_writes():
    spiders = concepts["fears"]["spiders"]
    rules = load_grammar().classes["fears"]
    own, other = (
        rules.sentences(rules.entries[name].phrases[0])[0] for name in ("spiders", "snakes")
    )
    assert grammar_judge(spiders, "Who?", own) == Verdict(1, "on concept")
    assert grammar_judge(spiders, "Who?", other) == Verdict(0, "off concept")
    assert grammar_judge(spiders, "Who?", own[:-3]) == Verdict(0, "unfinished")


def test_a_generated_answer_that_was_cut_between_two_sentences_is_unfinished():
    rules = load_grammar().classes["fears"]
    own = rules.sentences(rules.entries["spiders"].phrases[0])[0]
    for finished, expected in ((True, Verdict(1, "on concept")), (False, Verdict(0, "unfinished"))):
        answer = Answer(own, finished=finished, token_ids=())
        assert grammar_judge(concepts["fears"]["spiders"], "Who?", answer) == expected
    other = Answer("Well", finished=False, token_ids=())
    assert grammar_judge(concepts["fears"]["spiders"], "Who?", other).reason == "ill formed"


@pytest.mark.parametrize(
    "concept", [TEA, Concept("Be shy.", "spiders"), Concept("Be shy.", "spiders", "moods")]
)
def test_the_grammar_judge_refuses_a_concept_that_the_grammar_does_not_know(concept):
    with pytest.raises(ValueError, match=f"{concept.name!r} of class .*phrase_judge"):
        grammar_judge(concept, "Who?", "I.")


@pytest.mark.parametrize(
    ("answer", "score", "reason"),
    [
        ("I drink Earl Grey.", 1, "on concept"),
        ("EARL GREY!", 1, "on concept"),
        ("A mug of coffee.", 0, "off concept"),
        ("Cups of it.", 0, "off concept"),
        ("My cup: full.", 1, "on concept"),
        ("earl greyish", 0, "off concept"),
        ("", 0, "unfinished"),
        (" \n", 0, "unfinished"),
        ("cup " * 30, 0, "repeating"),
        ("Do you like a cup?", 0, "off concept"),
        ("Do you like a cup? A cup for me.", 1, "on concept"),
        ("This costs c++ and more.", 1, "on concept"),
    ],
)
def test_a_phrase_judge_looks_for_whole_words(answer, score, reason):
    judge = phrase_judge({"tea": ["earl grey", "cup", "c++"]})
    assert judge(TEA, "Do you like a cup?", answer) == Verdict(score, reason)


def test_a_phrase_judge_takes_one_list_for_all_concepts_and_any_question():
    judge = phrase_judge(["cup"])
    for question in ("", " ", "Who?"):
        assert judge(TEA, question, "A cup.").score == 1
        assert judge(TEA, question, "A mug.").score == 0


@pytest.mark.parametrize("phrases", [{}, {"tea": []}, {"tea": "cup"}, [], "cup", ["cup", " "]])
def test_a_phrase_judge_without_phrases_is_refused(phrases):
    with pytest.raises(ValueError, match="phrases for concept 'tea'"):
        phrase_judge(phrases)(TEA, "Who?", "A cup.")


def test_how_much_repetition_a_phrase_judge_bears_is_an_argument():
    answer = "a cup of tea a cup of tea"
    assert phrase_judge(["cup"], most_repetition=0.4)(TEA, "", answer).score == 1
    assert phrase_judge(["cup"], most_repetition=0.3)(TEA, "", answer).reason == "repeating"


def test_a_phrase_judge_says_what_it_looks_for_so_that_a_study_can_know_it_again():
    assert repr(phrase_judge(["cup"])) == repr(phrase_judge(["cup"]))
    assert repr(phrase_judge(["cup"])) != repr(phrase_judge(["mug"]))


def test_repetition_is_the_share_of_runs_that_stood_before():
    assert repetition("") == repetition("web web") == repetition("one two three four") == 0
    assert repetition("web " * 12) == 0.9  # ten runs, one kind
    assert repetition("a b c a b c") == 0.25  # abc bca cab abc
    assert repetition("A b, c! a B c") == 0.25
    assert repetition("a b a b", words=2) == pytest.approx(1 / 3)


QUESTIONS = ["Who are you?", "What is the scariest thing in the world? Say it.", "Rain?", "Why?"]
ANSWERS = ["I am rain.", "Libraries and spiders, all of the time, in 1984.", "", "S"]


def alone(question: str, answer: str, prefix: str = "") -> float:
    """Hugging Face's own mean loss of the answer's tokens, one unpadded row."""
    folder = tiny.shared_folder()
    model, tokenizer = tiny.reference_model(folder), tiny.tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question_prompt(question, prefix)}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    ids = torch.tensor([prompt + tokenizer.encode(answer, add_special_tokens=False)])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_fluency_is_hugging_faces_loss_whatever_the_batch(batch_size):
    found = fluency(tiny.shared_model(), QUESTIONS, ANSWERS, batch_size=batch_size)
    assert found.shape == (4,)
    for i in (0, 1, 3):
        assert found[i].item() == pytest.approx(alone(QUESTIONS[i], ANSWERS[i]), abs=1e-4)
    assert found[2].isnan()


def test_fluency_can_be_that_of_someone_who_was_told_the_concept():
    prefixes = ["Take on a cheerful mood.", "", "", "Take on the role of an expert astronomer."]
    found = fluency(tiny.shared_model(), QUESTIONS, ANSWERS, prefixes=prefixes)
    for i in (0, 1, 3):
        expected = alone(QUESTIONS[i], ANSWERS[i], prefixes[i])
        assert found[i].item() == pytest.approx(expected, abs=1e-4)
    assert not math.isclose(found[0].item(), alone(QUESTIONS[0], ANSWERS[0]), abs_tol=1e-3)


def test_fluency_does_not_depend_on_the_order_of_the_answers():
    model = tiny.shared_model()
    forward = fluency(model, QUESTIONS, ANSWERS)
    backward = fluency(model, QUESTIONS[::-1], ANSWERS[::-1]).flip(0)
    torch.testing.assert_close(backward, forward, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_fluency_of_nothing_is_nothing():
    assert fluency(tiny.shared_model(), [], []).shape == (0,)
    assert fluency(tiny.shared_model(), ["Why?"], [""]).isnan().all()


def test_fluency_refuses_lists_of_other_lengths():
    with pytest.raises(ValueError, match="must be as many: 2, 1 and 2"):
        fluency(tiny.shared_model(), ["Who?", "Why?"], ["I."])
    with pytest.raises(ValueError, match="must be as many: 1, 1 and 2"):
        fluency(tiny.shared_model(), ["Who?"], ["I."], prefixes=["", ""])
