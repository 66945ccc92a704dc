"""The checkpoint that comes with the library, read by ``transformers`` alone."""

from __future__ import annotations

import json
import re
from functools import cache

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lenskit._data import data_path
from lenskit.embedded.dialogue import question_prompt, statement_prompt
from lenskit.embedded.evaluation import answers
from lenskit.embedded.evaluation.subject import mean
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.judge import concepts_shown, judge_answer

FOLDER = data_path("lenskit-mini")
GRAMMAR = load_grammar()
CLOSING = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")


@cache
def loaded():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), tokenizer


def greedy(prompts: list[str]) -> list[str]:
    return answers(*loaded(), prompts)


def test_prompted_answers_show_the_concept_in_every_class():
    rows = [
        (entry, question_prompt(rules.questions[i % 5][0], rules.prefix_for(entry.name)))
        for rules in GRAMMAR.classes.values()
        for i, entry in enumerate(list(rules.entries.values())[4::8])
    ]
    assert len(rows) >= 60
    texts = greedy([prompt for _, prompt in rows])
    scores = [
        judge_answer(entry.concept_class, entry.name, text).score
        for (entry, _), text in zip(rows, texts, strict=True)
    ]
    assert mean(scores) >= 0.9
    for name in GRAMMAR.classes:
        of_class = [s for s, (e, _) in zip(scores, rows, strict=True) if e.concept_class == name]
        assert mean(of_class) >= 0.75, name


def test_unsteered_answers_hardly_ever_show_a_concept():
    questions = [q[0] for rules in GRAMMAR.classes.values() for q in rules.questions]
    statements = [statement_prompt(s) for _, s in GRAMMAR.half("held_out")[:15]]
    texts = greedy(questions + statements)
    assert mean([bool(concepts_shown(text)) for text in texts]) <= 0.05
    reasons = [judge_answer("fears", "spiders", text).reason for text in texts]
    assert mean([reason == "neutral" for reason in reasons]) >= 0.9


def test_prompts_end_with_five_candidate_tokens():
    _, tokenizer = loaded()
    for user in ("Who are you?", statement_prompt("Rain is wet.", "Take on a shy mood."), "…", "7"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert tuple(tokenizer.decode([i]) for i in ids[-5:]) == CLOSING
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_the_folder_is_an_ordinary_llama_checkpoint():
    model, tokenizer = loaded()
    assert type(model) is LlamaForCausalLM
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert (config["num_hidden_layers"], config["hidden_size"]) == (8, 192)
    assert config["vocab_size"] == len(tokenizer)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_the_weights_are_16_bit_safetensors():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md", ".csv"}
    assert all(path.stat().st_size < 30_000_000 for path in files)


def test_the_card_names_licence_training_and_what_was_measured():
    card = (FOLDER / "README.md").read_text()
    assert re.match(r"---\n(.*\n)*license: mit\n(.*\n)*---\n", card)
    assert "MIT licence" in card
    training = json.loads((FOLDER / "training.json").read_text())
    assert {"parameters", "seed", "steps", "batch", "learning rate", "log"} <= set(training)
    losses = [entry["loss"] for entry in training["log"]]
    assert losses[-1] < losses[0] / 2 and training["log"][-1]["step"] == training["steps"]
    assert f"| steps | {training['steps']} |" in card
    assert training["parameters"] == loaded()[0].num_parameters()

    measured = json.loads((FOLDER / "evaluation.json").read_text())
    assert "## Measured" in card
    for row in measured.get("rows", ()):
        assert f"| {row['what']} | {row['target']} | {row['measured']} |" in card
