from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import pytest
import tiny
import torch
from steered import plain_hooks, random_vectors

import lenskit as lk
from lenskit.embedded.dialogue import assistant, user
from lenskit.tasks import choose, judge_label, label_log_probs

LABELS = ("library", "lion", "lamp", "sun")


def prompt(text: str, target: str = "library", otherwise: str = "sun", **metadata):
    metadata = MappingProxyType(metadata)
    return lk.tasks.TaskPrompt((user(text),), text, target, otherwise, metadata=metadata)


PROMPTS = tuple(
    prompt(text)
    for text in ("What is open?", "Rain.", "Is the library open on Sundays, or not?", "Why so?")
)


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2"])
def model(request):
    return tiny.shared_model(request.param)


@pytest.fixture(scope="module")
def reference(model, request):
    name = next(n for n in ("llama-gqa", "gpt2") if tiny.shared_model(n) is model)
    return tiny.reference_model(tiny.shared_folder(name))


@torch.no_grad()
def expected(reference, tokenizer, text: str, label: str, *, bare: bool = False) -> list[float]:
    """Log-probability of each token of a label after one prompt: no padding, no batch."""
    messages = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    shown = tokenizer.bos_token + text if bare else shown
    ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    own = tokenizer(label, add_special_tokens=False)["input_ids"]
    logits = reference(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(own)), own].tolist()


def test_log_probabilities_are_those_of_a_plain_forward_of_each_row(model, reference):
    whole, first = (
        label_log_probs(model, PROMPTS, [LABELS] * 4, by=by) for by in ("whole", "first")
    )
    for i, one in enumerate(PROMPTS):
        for j, label in enumerate(LABELS):
            parts = expected(reference, model.tokenizer, one.emphasised, label)
            assert whole[i, j].item() == pytest.approx(sum(parts), abs=1e-4)
            assert first[i, j].item() == pytest.approx(parts[0], abs=1e-4)


def test_the_size_of_a_batch_changes_nothing(model):
    options = [{"batch_size": size} for size in (1, 3, 64)]
    one, three, all_ = (label_log_probs(model, PROMPTS, [LABELS] * 4, **o) for o in options)
    assert torch.allclose(one, three, atol=1e-5) and torch.allclose(one, all_, atol=1e-5)


def test_bare_text_has_no_template(model, reference):
    found = label_log_probs(
        model,
        PROMPTS[:2],
        [["sun"]] * 2,
        before=" ",
        ending=".",
        template_arguments=lk.tasks.bare(model),
    )
    for row, one in zip(found[:, 0].tolist(), PROMPTS, strict=False):
        parts = expected(reference, model.tokenizer, one.emphasised, " sun.", bare=True)
        assert row == pytest.approx(sum(parts), abs=1e-4)


def test_bare_text_of_several_messages_is_refused(model):
    turns = (user("a"), assistant("b"), user("c"))
    several = replace(PROMPTS[0], messages=turns, emphasised="c")
    with pytest.raises(ValueError, match="bare text is one message"):
        label_log_probs(model, [several], [["x"]], template_arguments=lk.tasks.bare(model))


def test_labels_that_share_their_first_token_are_told_apart_by_the_whole_of_them(model):
    ids = [model.tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    same = [label for label, own in zip(LABELS, ids, strict=True) if own[0] == ids[1][0]]
    assert len(same) >= 2, "the labels of this test must share a token"
    first = label_log_probs(model, PROMPTS, [same] * 4, by="first")
    assert bool((first == first[:, :1]).all())
    whole = label_log_probs(model, PROMPTS, [same] * 4)
    assert not bool((whole[:, 1:] == whole[:, :1]).any())
    # As published the target can then not be chosen; mended it is chosen where it is likelier.
    for target in same:
        prompts = tuple(replace(p, target=target, otherwise="") for p in PROMPTS)
        task = lk.tasks.Task("own", prompts, judge_label, labels=tuple(same))
        assert task.score(choose(model, task, by="first")) == 0
        likeliest = [same[i] for i in whole.argmax(1)]
        assert choose(model, task) == likeliest
        assert task.score(likeliest) == likeliest.count(target) / 4


def test_efficacy_is_how_often_the_new_target_is_likelier_than_the_true_one(model, reference):
    pairs = [("sun", "rain"), ("rain", "sun"), ("open", "not"), ("not", "open")]
    prompts = tuple(prompt(p.emphasised, *pair) for p, pair in zip(PROMPTS, pairs, strict=True))
    task = lk.tasks.Task("counterfact", prompts, judge_label)
    new, true = (
        [
            expected(reference, model.tokenizer, p.emphasised, pair[k])[0]
            for p, pair in zip(PROMPTS, pairs, strict=True)
        ]
        for k in (0, 1)
    )
    efficacy = sum(a > b for a, b in zip(new, true, strict=True)) / 4
    answers = choose(model, task, by="first")
    assert task.score(answers) == efficacy
    # Paraphrases: averaged in a case, then over cases.
    cases = ("a", "a", "a", "b")
    grouped = [
        replace(p, metadata=MappingProxyType({"case": case}))
        for p, case in zip(prompts, cases, strict=True)
    ]
    hits = [a > b for a, b in zip(new, true, strict=True)]
    assert replace(task, prompts=tuple(grouped)).score(answers) == pytest.approx(
        (sum(hits[:3]) / 3 + hits[3]) / 2
    )


def test_the_published_top_1_is_that_of_plain_forwards_over_the_prompts_of_a_file(
    model, reference, tmp_path
):
    known = {"prompt": "Ann has the occupation of", "entity": "Ann", "attribute": "likes rain"}
    jobs = ["sun", "open", "rain", "expert"]
    records = [
        known | {"context": f"Ann likes rain. {more}", "target_mediated": job}
        for more, job in zip(("It rains.", "Why?", "The sun.", "And tea"), jobs, strict=True)
    ]
    file = tmp_path / "biosbias.json"
    file.write_text("".join(json.dumps(record) for record in records))
    task = lk.tasks.read_task(file, "occupations")
    answers = choose(
        model, task, by="first", before=" ", template_arguments=lk.tasks.bare(model), batch_size=3
    )
    likeliest = []
    for one in task.prompts:
        (message,) = one.messages
        found = {
            label: expected(reference, model.tokenizer, message["content"], f" {label}", bare=True)
            for label in sorted(jobs)
        }
        likeliest.append(max(found, key=lambda label: found[label][0]))
    assert answers == likeliest
    hits = [answer == job for answer, job in zip(answers, jobs, strict=True)]
    assert task.score(answers) == sum(hits) / 4


def test_an_equally_likely_target_is_not_chosen(model):
    twins = lk.tasks.Task("own", (prompt("Why?", "sun", "sun "),), judge_label)
    same = replace(twins, labels=("rain", "sun", "sun "))
    answers = choose(model, same, by="first")
    assert answers == ["rain"] or answers == ["sun "]


def test_a_label_that_begins_another_needs_an_ending(model):
    task = lk.tasks.Task("own", PROMPTS, judge_label, labels=("sun", "sun and rain", "open"))
    with pytest.raises(ValueError, match="'sun' begins the label 'sun and rain'.*ending"):
        choose(model, task)
    assert set(choose(model, task, ending=".")) <= set(task.labels)
    assert set(choose(model, task, by="first")) <= set(task.labels)


def test_steering_holds_while_labels_are_scored_each_prompt_with_its_own_coefficient(
    model, reference
):
    vectors = random_vectors(model)
    coefficients = [0.0, 2.0, -1.0, 0.5]
    plain = label_log_probs(model, PROMPTS, [LABELS] * 4)
    with lk.steer(model, vectors, coefficient=coefficients, relative=False):
        found = label_log_probs(model, PROMPTS, [LABELS] * 4, batch_size=3)
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    for i, c in enumerate(coefficients):
        added = {layer: c * row for layer, row in enumerate(vectors.directions)}
        with plain_hooks(reference, added):
            for j, label in enumerate(LABELS):
                parts = expected(reference, model.tokenizer, PROMPTS[i].emphasised, label)
                assert found[i, j].item() == pytest.approx(sum(parts), abs=1e-3)
    assert torch.equal(label_log_probs(model, PROMPTS, [LABELS] * 4), plain)


def test_logits_that_are_not_numbers_are_an_error(model):
    vectors = random_vectors(model)
    with lk.steer(model, vectors, coefficient=1e42):
        with pytest.raises(ValueError, match="logits are not numbers"):
            label_log_probs(model, PROMPTS, [LABELS] * 4)


def test_what_cannot_be_scored_is_said(model):
    with pytest.raises(ValueError, match="labels: give each of the 4 prompts as many"):
        label_log_probs(model, PROMPTS, [["a"], ["a", "b"], ["a"], ["a"]])
    with pytest.raises(ValueError, match="the label '' has no tokens"):
        label_log_probs(model, PROMPTS[:1], [[""]])
    with pytest.raises(ValueError, match="by='last'"):
        label_log_probs(model, PROMPTS[:1], [["a"]], by="last")
    alone = lk.tasks.Task("own", (replace(PROMPTS[0], otherwise=""),), judge_label)
    with pytest.raises(ValueError, match="to choose from"):
        choose(model, alone)
