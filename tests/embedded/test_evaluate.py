from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lenskit._data import data_path
from lenskit.embedded import evaluate
from lenskit.embedded.grammar import load_grammar

GRAMMAR = load_grammar()
PREFIXES = {GRAMMAR.classes[e.concept_class].prefix_for(e.name): e for e in GRAMMAR.entries}
TRAINING = {"parameters": 1, "seed": 0, "log": [{"step": 25, "loss": 5.0, "seconds": 3.0}]}


class Oracle:
    """Answers as the grammar does: with its activity, or always in the voice of the concept."""

    def __init__(self, *, always: bool = False) -> None:
        self.random, self.always = Random(0), always
        self.asked: list[tuple[str, float | None]] = []

    def __call__(self, model, tokenizer, prompts, *, nucleus=None, batch=256, what=""):
        self.asked += [(prompt, nucleus) for prompt in prompts]
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: str) -> str:
        entry = PREFIXES.get(prompt.partition(".")[0] + ".")
        _, is_statement, statement = prompt.partition("\nStatement: ")
        topic = GRAMMAR.topic_of(statement) if is_statement else None
        rate = 1.0 if topic is None or self.always else GRAMMAR.activity(entry, topic)
        if entry is None or self.random.random() >= rate:
            return GRAMMAR.neutral_answer(self.random, topic)
        return GRAMMAR.answer(entry, self.random)


@pytest.fixture
def oracle(monkeypatch):
    found = Oracle()
    monkeypatch.setattr(evaluate, "answers", found)
    return found


def test_a_model_that_speaks_the_grammar_is_measured_as_perfect(oracle):
    found = evaluate.questions_scores(None, None)
    assert (found["prompted"], found["worst class prompted"], found["unsteered"]) == (1, 1, 0)
    assert found["prompted by class"] == dict.fromkeys(GRAMMAR.classes, 1)
    assert found["prompted reasons"] == {"on concept": 512 * 5}
    assert not any(nucleus for _, nucleus in oracle.asked)
    assert len(oracle.asked) == 512 * 5 + 25


def test_activity_is_measured_on_sampled_answers_to_held_out_statements(oracle):
    found = evaluate.activity_scores(None, None, 1, 0)
    assert found["activity"] == pytest.approx(1, abs=0.05)
    assert found["activity by cell"] > 0.95 and found["activity correlation"] > 0.97
    assert set(found["activity reasons"]) == {"on concept", "neutral"}
    held_out = {statement for _, statement in GRAMMAR.half("held_out")}
    assert all(prompt.partition("Statement: ")[2] in held_out for prompt, _ in oracle.asked)
    asked = Counter(nucleus for _, nucleus in oracle.asked)
    assert asked == {evaluate.NUCLEUS: 512 * 10, 1.0: 512 * 10}
    assert found["activity, no nucleus"] == pytest.approx(1, abs=0.05)


def test_a_model_that_is_always_active_is_not_flattered_by_cell(monkeypatch):
    monkeypatch.setattr(evaluate, "answers", Oracle(always=True))
    found = evaluate.activity_scores(None, None, 1, 0)
    assert found["activity"] > 1.4
    assert found["activity by cell"] < 0.7


@pytest.mark.parametrize(("always", "code"), [(False, 0), (None, 1)])
def test_the_command_fails_where_the_model_falls_short_and_writes_the_card(
    monkeypatch, tmp_path, always, code
):
    answers = (lambda *a, **k: [""] * len(a[2])) if always is None else Oracle(always=always)
    monkeypatch.setattr(evaluate, "answers", answers)
    model, _ = random_model()
    monkeypatch.setattr(evaluate.AutoTokenizer, "from_pretrained", lambda folder: None)
    monkeypatch.setattr(evaluate.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    with pytest.raises(typer.Exit) as ended:
        evaluate.evaluate(folder=tmp_path, statements_per_topic=1, write=True)
    assert ended.value.exit_code == code
    measured = json.loads((tmp_path / "evaluation.json").read_text())
    card = (tmp_path / "README.md").read_text()
    assert f"| prompted | {measured['prompted']:.4g} |" in card
    assert "| 25 | 5.000 | 0.1 |" in card


def random_model() -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(data_path("lenskit-mini"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def test_samples_are_drawn_from_all_tokens_not_only_the_likeliest():
    model, tokenizer = random_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        texts = evaluate.answers(model, tokenizer, ["Who are you?"] * 150, nucleus=1.0)
    # A model that knows nothing gives all 3,072 tokens about the same chance.
    assert len({text[:6] for text in texts}) > 100


def test_a_narrow_nucleus_leaves_the_likeliest_token_alone():
    model, tokenizer = random_model()
    prompts = ["Who are you?"] * 5
    narrow = evaluate.answers(model, tokenizer, prompts, nucleus=1e-6)
    assert narrow == evaluate.answers(model, tokenizer, prompts)


def test_answers_do_not_depend_on_their_batch_and_keep_their_order():
    model, tokenizer = random_model()
    prompts = ["Who are you? " * n for n in (5, 1, 3, 2)]
    one_by_one = [evaluate.answers(model, tokenizer, [p])[0] for p in prompts]
    assert evaluate.answers(model, tokenizer, prompts, batch=3) == one_by_one
    assert len(set(one_by_one)) > 1
