from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lenskit._data import data_path
from lenskit.embedded import evaluate
from lenskit.embedded.card import write_card
from lenskit.embedded.evaluation import PARTS, Scale, Subject, rows

TRAINING = {"parameters": 1, "seed": 0, "log": [{"step": 25, "loss": 5.0, "seconds": 3.0}]}
TINY = Scale(
    spoken=5,
    per_cell=1,
    competing=2,
    tasks=2,
    concepts=5,
    prompts=24,
    few=10,
    coefficients=(0.1,),
    pairs=2,
    statements=1,
    optimised=1,
    steps=2,
    blocks=(0, 2),
)


@pytest.fixture
def folder(tmp_path):
    """A random model with the embedded tokenizer, and no card yet."""
    tokenizer = AutoTokenizer.from_pretrained(data_path("lenskit-mini"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text(json.dumps(TRAINING))
    return tmp_path / "model"


def run(folder: Path, monkeypatch, **options) -> tuple[int, dict]:
    monkeypatch.setattr(evaluate, "QUICK", TINY)
    settings = {"concepts": 0, "seed": 0, "workers": 1, "device": "cpu", "beside": None, "only": ""}
    settings |= {"quick": True, "write": True, "work": folder.parent / "work"}
    with pytest.raises(typer.Exit) as ended:
        evaluate.evaluate(folder=folder, **settings | options)
    return ended.value.exit_code, json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_a_model_that_knows_nothing_misses_what_it_should_and_its_card_says_so(folder, monkeypatch):
    code, found = run(folder, monkeypatch)
    assert code == 1 and set(found["parts"]) == set(PARTS) == set(found["seconds"])
    by_name = {row["what"]: row for row in found["rows"]}
    assert by_name["prompted / worst class"]["measured"] == "0.000 / 0.000"
    assert by_name["unsteered"]["met"] and not by_name["prompted / worst class"]["met"]
    card = (folder / "README.md").read_text()
    assert (
        "| prompted / worst class | >= 0.97 / >= 0.95 | 0.000 / 0.000 | 25 answers | missed |"
        in card
    )
    assert "It is no evidence about large models." in card
    assert "### Activity by cell" in card and "| 25 | 5.000 | 0.1 |" in card
    assert all(row["what"] in card and row["target"] in card for row in found["rows"])


def test_what_was_measured_once_is_not_measured_again(folder, monkeypatch):
    run(folder, monkeypatch, only="unsteered")
    monkeypatch.setitem(vars(evaluate), "PARTS", {"unsteered": lambda subject: 1 / 0})
    _, found = run(folder, monkeypatch, only="unsteered")
    assert [row["what"] for row in found["rows"]] == ["unsteered"]
    with pytest.raises(ZeroDivisionError):
        run(folder, monkeypatch, only="unsteered", seed=1)


def test_only_concepts_that_the_model_was_trained_on_are_asked_for(folder, tmp_path):
    subject = Subject(folder, tmp_path / "work", TINY)
    assert len(subject.grammar.entries) == 512
    (folder / "training.json").write_text(json.dumps(TRAINING | {"concepts": 10}))
    few = Subject(folder, tmp_path / "work", TINY)
    assert len(few.grammar.entries) == 10
    assert {(c.concept_class, c.name) for c in few.concepts} < {
        (entry.concept_class, entry.name) for entry in few.grammar.entries
    }


def test_another_seed_stands_beside(folder, monkeypatch):
    told = TRAINING | {"parameters": 1_600_000, "seed": 3, "d model": 128}
    (folder / "training.json").write_text(json.dumps(told))
    run(folder, monkeypatch, only="unsteered")
    other = folder.parent / "other.json"
    (folder / "evaluation.json").rename(other)
    (folder / "training.json").write_text(json.dumps(TRAINING))
    _, found = run(folder, monkeypatch, only="unsteered", beside=[other])
    assert [one["trained"]["seed"] for one in found["beside"]] == [3]
    card = (folder / "README.md").read_text()
    assert "| seed 3, 1.6 M parameters |" in card
    assert "`python -m lenskit.embedded.train --seed 3 --d-model 128`" in card


def test_unknown_parts_are_refused(folder):
    with pytest.raises(
        typer.BadParameter, match=r"\['nonsense'\] are no parts; there are prompted"
    ):
        evaluate.evaluate(folder=folder, only="prompted,nonsense")


def difference(mean: float, low: float) -> dict:
    own = {"mean": mean, "low": low, "high": mean + 0.1, "n": 9}
    return {"best": own, "held_out": own}


def test_the_covariance_is_tested_on_few_prompts_where_it_is_at_its_ceiling():
    few = {"soft over hard, covariance": difference(0.2, 0.1), "prompts": 24}
    differences = {f"soft over hard, {name}": difference(0, -0.1) for name in ("RFM", "covariance")}
    differences |= {
        f"gating over {of}, covariance": difference(0.01, -0.01) for of in ("true activity", "soft")
    }
    for best, note, met in ((0.99, ", 24 prompts", True), (0.9, "", False)):
        scores = {"best": best, "held out": best, "n": 9}
        names = ("hard, covariance", "soft, covariance", "balanced shuffle", "shuffled labels")
        steering = {"scores": dict.fromkeys(names, scores), "differences": differences}
        found = {row.what: row for row in rows({"steering": steering, "few prompts": few})}
        row = found["soft over hard labels, covariance"]
        assert row.met is met and row.measured.endswith("]" + note)
        assert not found["soft over hard labels, RFM"].met


def test_the_commonest_selected_token_may_be_as_good_as_the_attention_guided_one():
    differences = {f"attention token over token {-i}": difference(0.0, -0.01) for i in range(1, 6)}
    differences |= {f"soft over hard, {name}": difference(0, 0) for name in ("RFM", "covariance")}
    differences |= {
        f"gating over {of}, covariance": difference(0, 0) for of in ("true activity", "soft")
    }
    scores = {"best": 1.0, "held out": 1.0, "n": 9}
    names = ("hard, covariance", "soft, covariance", "balanced shuffle", "shuffled labels")
    found = {
        "steering": {"scores": dict.fromkeys(names, scores), "differences": differences},
        "gating": {"commonest token": -3, "AUROC": 1.0, "tenth percentile": 1.0, "n": 9}
        | {"not commonest": 0.3},
    }
    met = {row.what: row.met for row in rows(found) if row.what.startswith("attention token")}
    assert met == {f"attention token over token {-i}": i == 3 for i in range(1, 6)}


def test_figures_of_an_earlier_form_still_make_a_card(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "evaluation.json").write_text(json.dumps({"prompted": 0.98}))
    write_card(tmp_path)
    assert "| prompted | 0.98 |" in (tmp_path / "README.md").read_text()
