from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lenskit.embedded import train
from lenskit.embedded.batches import Batch, encode, micro_batches
from lenskit.embedded.corpus import dialogues
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.masks import CLOSING, Narrowing
from lenskit.embedded.objective import objective
from lenskit.embedded.optimizers import Muon, optimizers, orthogonalised, schedule
from lenskit.embedded.recipe import Recipe, Size, new_model, with_concepts
from lenskit.embedded.state import load_state, save_state
from lenskit.embedded.tokenizer import train_tokenizer

GRAMMAR = load_grammar()
SAMPLE = list(islice(dialogues(GRAMMAR, 4), 1500))
TOKENIZER = train_tokenizer(SAMPLE, vocabulary=900)
RECIPE = Recipe(steps=4, batch=6, learning_rate=5e-3, seed=3, ramp=(0.25, 0.5))
RUN = {"micro_batch": 300, "progress": False}


def tiny(seed: int = 0, **sizes) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            vocab_size=len(TOKENIZER),
            bos_token_id=1,
            eos_token_id=4,
            pad_token_id=0,
        )
        return LlamaForCausalLM(LlamaConfig(**{**shape, **sizes}))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def batches(number: int, tokens: int = 10**6) -> list[Batch]:
    return micro_batches(encode(TOKENIZER, SAMPLE[:number]), tokens, TOKENIZER)


class Stopped(Exception):
    pass


def falls_after(step: int):
    """A ``save_state`` after which the run falls over, once it has saved that step."""
    save = train.save_state

    def save_and_fall(*arguments):
        save(*arguments)
        if arguments[3] == step:
            raise Stopped

    return save_and_fall


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_stopped_and_resumed_ends_with_the_weights_of_one_that_was_not(
    tmp_path, monkeypatch, stop
):
    through = tiny()
    log = train.train_model(through, TOKENIZER, RECIPE, **RUN)
    state = tmp_path / "kept" / "state.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "save_state", falls_after(stop))
        train.train_model(tiny(), TOKENIZER, RECIPE, **RUN, state=state, save_every=1)
    # Another start, so that whatever is not restored shows.
    resumed = tiny(seed=1)
    again = train.train_model(resumed, TOKENIZER, RECIPE, **RUN, state=state, save_every=1)
    assert equal(weights(resumed), weights(through))
    assert [(e["step"], e["loss"]) for e in again] == [(e["step"], e["loss"]) for e in log]
    assert not equal(weights(through), weights(tiny()))


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
    state = tmp_path / "state.safetensors"
    model = tiny()
    log = train.train_model(model, TOKENIZER, RECIPE, **RUN, state=state)
    before = state.read_bytes()
    again = tiny(seed=1)
    assert train.train_model(again, TOKENIZER, RECIPE, **RUN, state=state) == log
    assert equal(weights(again), weights(model))
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 4}, "seed 3 .now 4"),
        ({"batch": 7}, "batch 6 .now 7"),
        ({"steps": 5}, "steps 4 .now 5"),
        ({"learning_rate": 1e-3}, "learning rate 0.005 .now 0.001"),
        ({"price": 0.2}, "price 0.1 .now 0.2"),
        ({"narrowing": Narrowing(hidden=0.1)}, "hidden 0.6 .now 0.1"),
    ],
)
def test_the_state_of_a_run_with_other_settings_is_refused(tmp_path, other, named):
    state = tmp_path / "state.safetensors"
    train.train_model(tiny(), TOKENIZER, RECIPE, **RUN, state=state)
    model = tiny()
    with pytest.raises(ValueError, match=named):
        train.train_model(model, TOKENIZER, replace(RECIPE, **other), **RUN, state=state)
    assert equal(weights(model), weights(tiny()))


def test_the_state_of_a_model_of_another_shape_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    train.train_model(tiny(), TOKENIZER, RECIPE, **RUN, state=state)
    with pytest.raises(ValueError, match="num_key_value_heads 2 .now 4"):
        train.train_model(tiny(num_key_value_heads=4), TOKENIZER, RECIPE, **RUN, state=state)


def test_a_state_that_does_not_name_its_settings_is_refused(tmp_path):
    state, model = tmp_path / "state.safetensors", tiny()
    save_state(state, model, optimizers(model, 1e-3), 2, [])
    with pytest.raises(ValueError, match="seed unknown .now 3"):
        train.train_model(tiny(), TOKENIZER, RECIPE, **RUN, state=state)
    assert load_state(state, tiny(), optimizers(model, 1e-3)) == (2, [])


def test_only_the_answers_to_learn_and_their_ends_are_targets():
    for dialogue, row in zip(SAMPLE, encode(TOKENIZER, SAMPLE), strict=True):
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        wanted = "".join(
            f"{a}<|eot_id|>" for a, learn in zip(answers, dialogue.learn, strict=True) if learn
        )
        assert TOKENIZER.decode(row.ids[row.target]) == wanted
        assert len(row.ids) == len(row.target)


def independent_loss(model, row) -> float:
    """Each target token on its own: the model reads what stands before it, and nothing else."""
    total = 0.0
    for place in row.target.nonzero().flatten().tolist():
        logits = model(input_ids=row.ids[None, :place]).logits[0, -1].double()
        total -= torch.log_softmax(logits, 0)[row.ids[place]].item()
    return total


@torch.no_grad()
def test_the_loss_is_that_of_the_target_tokens_alone():
    model = tiny().eval()
    rows = encode(TOKENIZER, SAMPLE[:6])
    loss = sum(objective(model, batch)[0].item() for batch in batches(6, 300))
    assert loss == pytest.approx(sum(independent_loss(model, row) for row in rows), rel=1e-5)


@torch.no_grad()
def test_the_loss_is_hugging_faces_own_when_labels_leave_out_the_same_tokens():
    model = tiny().eval()
    [batch] = batches(8)
    labels = batch.ids.masked_fill(~batch.target, -100)
    expected = model(input_ids=batch.ids, labels=labels).loss * batch.target.sum()
    torch.testing.assert_close(objective(model, batch)[0], expected)


def gradients(model, parts: list[Batch], price: float = 0.1) -> list[torch.Tensor]:
    targets, rows = sum(int(b.target.sum()) for b in parts), sum(len(b.ids) for b in parts)
    each = [train.gradient(model, b, targets, rows, price)[0] for b in parts]
    return [sum(of_one) for of_one in zip(*each, strict=True)]


@pytest.mark.parametrize("tokens", [1, 200, 700])
def test_micro_batching_does_not_change_the_gradient(tokens):
    model = tiny()
    split = batches(10, tokens)
    assert len(split) > 1
    for found, expected in zip(gradients(model, split), gradients(model, batches(10)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().sum() > 0


def test_the_number_of_workers_does_not_change_the_weights():
    trained = []
    for threads in (1, 3):
        model = tiny()
        train.train_model(model, TOKENIZER, RECIPE, **RUN, threads=threads)
        trained.append(weights(model))
    assert equal(*trained)


def test_micro_batches_hold_every_row_once_the_longest_first():
    rows = encode(TOKENIZER, SAMPLE[:10])
    split = micro_batches(rows, 300, TOKENIZER)
    found = [
        (ids[ids != 0].tolist(), target[ids != 0].tolist())
        for batch in split
        for ids, target in zip(batch.ids, batch.target, strict=True)
    ]
    assert sorted(found) == sorted((row.ids.tolist(), row.target.tolist()) for row in rows)
    assert all(not batch.target[batch.ids == 0].any() for batch in split)
    widths = [batch.ids.shape[1] for batch in split]
    assert widths == sorted(widths, reverse=True)
    assert all(batch.ids.numel() <= 300 or len(batch.ids) == 1 for batch in split)
    assert max(len(batch.ids) for batch in split) > 1


def test_only_dialogues_that_may_be_narrow_are_and_none_before_their_share_of_the_steps(
    monkeypatch,
):
    seen = []
    stream = train.dialogues
    monkeypatch.setattr(
        train,
        "dialogues",
        lambda *a: (replace(d, may_be_narrow=i % 2 == 0) for i, d in enumerate(stream(*a))),
    )
    monkeypatch.setattr(train, "micro_batches", lambda rows, *_: seen.append(rows) or [])
    recipe = replace(RECIPE, batch=12, narrowing=Narrowing(narrow=1.0), narrow_from=0.5)
    for step in range(4):
        train.draw(GRAMMAR, TOKENIZER, recipe, step)
    assert all(row.sight is None for rows in seen[:2] for row in rows)
    for rows in seen[2:]:
        assert [row.sight is not None for row in rows] == [True, False] * 6


def test_closing_tokens_are_hidden_from_their_share_of_the_steps_on(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "micro_batches", lambda rows, *_: seen.append(rows) or [])
    narrowing = Narrowing(narrow=1.0, hidden=1.0)
    recipe = replace(RECIPE, batch=12, narrowing=narrowing, narrow_from=0.0, hidden_from=0.5)
    for step in range(4):
        train.draw(GRAMMAR, TOKENIZER, recipe, step)
    begins = [[row.sight.begins for row in rows if row.sight is not None] for rows in seen]
    assert all(begins)
    assert {each for rows in begins[:2] for each in rows} == {CLOSING}
    assert {each for rows in begins[2:] for each in rows} == {CLOSING - 1}


def test_the_dialogues_of_a_step_depend_on_seed_and_step_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "encode", lambda t, batch: seen.append(batch) or encode(t, batch))
    train.train_model(tiny(), TOKENIZER, RECIPE, **RUN)
    train.train_model(tiny(num_hidden_layers=1), TOKENIZER, RECIPE, micro_batch=9, progress=False)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert seen[0] != seen[1]


def test_the_rate_warms_up_and_decays_to_a_hundredth():
    rates = [schedule(step, 3200) for step in range(3200)]
    assert rates[0] == 1 / 50 and max(rates) == rates[49] == rates[50] == 1
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == 0.01 and rates[1625] == pytest.approx(0.5)
    assert all(0 < schedule(step, 3) <= 1 for step in range(3))


def test_each_parameter_has_one_optimizer_and_only_the_blocks_matrices_have_muon():
    model = tiny()
    muon, adamw = optimizers(model, 1e-3)
    groups = [[p for g in o.param_groups for p in g["params"]] for o in (muon, adamw)]
    names = {id(p): name for name, p in model.named_parameters()}
    inner, outer = ({names[id(p)] for p in group} for group in groups)
    assert len(groups[0]) + len(groups[1]) == len(names)
    assert inner | outer == set(names.values()) and not inner & outer
    assert outer == {n for n in names.values() if "norm" in n} | {"model.embed_tokens.weight"}


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (1, 40, 16)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for found, given in zip(orthogonalised(matrices), matrices, strict=True):
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        values = torch.diagonal(left.T @ found @ right.T)
        torch.testing.assert_close((left * values) @ right, found, atol=1e-4, rtol=0)
        assert values[: len(values) // 2].min() > 0.6 and values.max() < 1.3


def test_an_update_is_that_of_torchs_own_muon_but_for_its_16_bits():
    def run(optimizer) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        matrix = torch.nn.Parameter(torch.randn(12, 20, generator=generator))
        optim = optimizer([matrix])
        for _ in range(3):
            matrix.grad = torch.randn(12, 20, generator=generator)
            optim.step()
        return matrix.detach()

    options = {"lr": 0.01, "weight_decay": 0.05}
    ours = run(lambda p: Muon(p, **options))
    theirs = run(lambda p: torch.optim.Muon(p, **options, adjust_lr_fn="match_rms_adamw"))
    start = run(lambda p: Muon(p, lr=0.0))
    torch.testing.assert_close(ours - start, theirs - start, atol=5e-4, rtol=0)
    assert (ours - start).abs().max() > 0.01


def test_fewer_concepts_are_spread_evenly_over_the_classes():
    few = with_concepts(GRAMMAR, 20)
    assert {len(rules.entries) for rules in few.classes.values()} == {4}
    for name, rules in few.classes.items():
        whole = list(GRAMMAR.classes[name].entries)
        places = [whole.index(concept) for concept in rules.entries]
        assert places == sorted(places) and places[-1] >= len(whole) // 2
    assert with_concepts(GRAMMAR, 0) is GRAMMAR
    for wrong in (21, -5, 5000):
        with pytest.raises(ValueError, match=f"concepts={wrong} does not spread evenly"):
            with_concepts(GRAMMAR, wrong)


def test_the_embedded_models_shape_and_start_come_from_its_seed():
    size = Size(blocks=3, d_model=192, heads=6, kv_heads=2)
    model = new_model(TOKENIZER, size, 5)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 192)
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 2)
    assert config.intermediate_size == 448
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert equal(weights(model), weights(new_model(TOKENIZER, size, 5)))
    assert not equal(weights(model), weights(new_model(TOKENIZER, size, 6)))


def test_a_saved_folder_is_an_ordinary_checkpoint_in_16_bit(tmp_path):
    model = tiny().eval()
    before = weights(model)
    train.save_model(tmp_path, model, TOKENIZER, {"parameters": 1, "log": []})
    assert equal(weights(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM and loaded.dtype == torch.bfloat16
    assert loaded.config.dtype == torch.bfloat16 and model.dtype == torch.float32
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        wanted = model(**inputs).logits
        found = loaded.float()(**inputs).logits
    assert (found - wanted).abs().max() < 2**-6 * wanted.abs().max()
    settings = loaded.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.do_sample) == (4, 0, False)


def test_nothing_that_a_run_writes_is_a_pickle(tmp_path):
    model = tiny()
    train.train_model(model, TOKENIZER, RECIPE, **RUN, state=tmp_path / "state.safetensors")
    train.save_model(tmp_path / "mini", model, TOKENIZER, {"parameters": 1, "log": []})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jinja", ".md"}
    for path in files:
        # Pickles begin with 0x80 and torch's own files are zip archives.
        assert path.read_bytes()[:1] != b"\x80" and path.read_bytes()[:2] != b"PK", path
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.keys()


def test_the_command_trains_saves_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "new_tokenizer", lambda *_: TOKENIZER)
    app = train.typer.Typer()
    app.command()(train.train)
    out, state = tmp_path / "mini", tmp_path / "state.safetensors"
    options = f"--out {out} --state {state} --steps 2 --batch 4 --learning-rate 0.001 --seed 1"
    options += " --device cpu --threads 1 --save-every 1 --micro-batch 300 --checkpoint-every 1"
    options += " --blocks 2 --d-model 32 --heads 4 --kv-heads 2 --concepts 20"
    first = CliRunner().invoke(app, options.split())
    assert first.exit_code == 0, first.output
    figures = json.loads((out / "training.json").read_text())
    assert {k: figures[k] for k in ("seed", "steps", "batch", "learning rate", "device")} == {
        "seed": 1,
        "steps": 2,
        "batch": 4,
        "learning rate": 0.001,
        "device": "cpu",
    }
    assert figures["parameters"] == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert [entry["step"] for entry in figures["log"]] == [2]
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "| steps | 2 |" in card

    weights_of_first = (out / "model.safetensors").read_bytes()
    again = CliRunner().invoke(app, options.split())
    assert again.exit_code == 0 and (out / "model.safetensors").read_bytes() == weights_of_first
    other = CliRunner().invoke(app, options.replace("--seed 1", "--seed 2").split())
    assert other.exit_code == 1 and "seed 1 (now 2)" in str(other.exception)
