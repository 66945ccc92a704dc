from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lenskit.embedded import train
from lenskit.embedded.corpus import dialogues
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.tokenizer import train_tokenizer

GRAMMAR = load_grammar()
SAMPLE = list(islice(dialogues(GRAMMAR, 4), 1500))
TOKENIZER = train_tokenizer(SAMPLE, vocabulary=900)
RUN = {
    "steps": 4,
    "batch": 6,
    "learning_rate": 5e-3,
    "seed": 3,
    "first_steps": 2,
    "parts": 2,
    "progress": False,
}


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


def one_batch() -> tuple[torch.Tensor, torch.Tensor]:
    rows = train.encode(TOKENIZER, SAMPLE[:8])
    return train.micro_batches(rows, 1, TOKENIZER.pad_token_id)[0]


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
    log = train.train_model(through, TOKENIZER, **RUN)
    state = tmp_path / "kept" / "state.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "save_state", falls_after(stop))
        train.train_model(tiny(), TOKENIZER, **RUN, state=state, save_every=1)
    # Another start, so that whatever is not restored shows.
    resumed = tiny(seed=1)
    again = train.train_model(resumed, TOKENIZER, **RUN, state=state, save_every=1)
    assert equal(weights(resumed), weights(through))
    assert [(e["step"], e["loss"]) for e in again] == [(e["step"], e["loss"]) for e in log]
    assert not equal(weights(through), weights(tiny()))


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
    state = tmp_path / "state.safetensors"
    model = tiny()
    log = train.train_model(model, TOKENIZER, **RUN, state=state)
    before = state.read_bytes()
    again = tiny(seed=1)
    assert train.train_model(again, TOKENIZER, **RUN, state=state) == log
    assert equal(weights(again), weights(model))
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 4}, "seed 3 .now 4"),
        ({"batch": 7}, "batch 6 .now 7"),
        ({"steps": 5}, "steps 4 .now 5"),
        ({"learning_rate": 1e-3}, "learning_rate 0.005 .now 0.001"),
    ],
)
def test_the_state_of_a_run_with_other_settings_is_refused(tmp_path, other, named):
    state = tmp_path / "state.safetensors"
    train.train_model(tiny(), TOKENIZER, **RUN, state=state)
    model = tiny()
    with pytest.raises(ValueError, match=named):
        train.train_model(model, TOKENIZER, **{**RUN, **other}, state=state)
    assert equal(weights(model), weights(tiny()))


def test_the_state_of_a_model_of_another_shape_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    train.train_model(tiny(), TOKENIZER, **RUN, state=state)
    with pytest.raises(ValueError, match="num_key_value_heads 2 .now 4"):
        train.train_model(tiny(num_key_value_heads=4), TOKENIZER, **RUN, state=state)


def test_a_state_that_does_not_name_its_settings_is_refused(tmp_path):
    state, model = tmp_path / "state.safetensors", tiny()
    train.save_state(state, model, train.optimizers(model, 1e-3), 2, [])
    with pytest.raises(ValueError, match="seed unknown .now 3"):
        train.train_model(tiny(), TOKENIZER, **RUN, state=state)
    assert train.load_state(state, tiny(), train.optimizers(model, 1e-3)) == (2, [])


def test_only_the_answers_to_learn_and_their_ends_are_targets():
    for dialogue, (ids, target) in zip(SAMPLE, train.encode(TOKENIZER, SAMPLE), strict=True):
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        wanted = "".join(
            f"{a}<|eot_id|>" for a, learn in zip(answers, dialogue.learn, strict=True) if learn
        )
        assert TOKENIZER.decode(ids[target]) == wanted
        assert len(ids) == len(target)


def independent_loss(model, rows) -> float:
    """Each target token on its own: the model reads what stands before it, and nothing else."""
    total = 0.0
    for ids, target in rows:
        for place in target.nonzero().flatten().tolist():
            logits = model(input_ids=ids[None, :place]).logits[0, -1].double()
            total -= torch.log_softmax(logits, 0)[ids[place]].item()
    return total


@torch.no_grad()
def test_the_loss_is_that_of_the_target_tokens_alone():
    model = tiny().eval()
    rows = train.encode(TOKENIZER, [SAMPLE[i] for i in range(6)])
    batches = train.micro_batches(rows, 2, TOKENIZER.pad_token_id)
    loss = sum(train.target_loss(model, ids, target).item() for ids, target in batches)
    assert loss == pytest.approx(independent_loss(model, rows), rel=1e-5)


@torch.no_grad()
def test_the_loss_is_hugging_faces_own_when_labels_leave_out_the_same_tokens():
    model = tiny().eval()
    [(ids, target)] = train.micro_batches(train.encode(TOKENIZER, SAMPLE[:8]), 1, 0)
    labels = ids.masked_fill(~target, -100)
    expected = model(input_ids=ids, labels=labels).loss * target.sum()
    torch.testing.assert_close(train.target_loss(model, ids, target), expected)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_micro_batching_does_not_change_the_gradient(parts):
    model = tiny().double()
    rows = train.encode(TOKENIZER, SAMPLE[:10])

    def gradients(number: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for ids, target in train.micro_batches(rows, number, TOKENIZER.pad_token_id):
            train.target_loss(model, ids, target).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, split = gradients(1), gradients(parts)
    # The loss itself is taken in float32.
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5)
        assert gradient.abs().sum() > 0


def test_a_narrow_answer_sees_the_closing_tokens_and_itself_but_not_the_prompts_text():
    ids, _ = one_batch()
    header = TOKENIZER.convert_tokens_to_ids("<|start_header_id|>")
    narrow = torch.arange(len(ids)) % 2 == 0
    mask = train.bottleneck_mask(ids, narrow, header)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for row in range(len(ids)):
        if not narrow[row]:
            assert torch.equal(mask[row, 0], causal)
            continue
        opens = int((ids[row] == header).nonzero()[-1])
        for query in range(ids.shape[1]):
            seen = set(mask[row, 0, query].nonzero().flatten().tolist())
            if query < opens + 4:
                assert seen == set(range(query + 1))
            else:
                assert seen == {0, *range(opens - 1, query + 1)}


def test_a_mask_that_hides_nothing_leaves_the_loss_as_it_is():
    ids, target = one_batch()
    model = tiny()
    header = TOKENIZER.convert_tokens_to_ids("<|start_header_id|>")
    wide = torch.zeros(len(ids), dtype=torch.bool)
    plain = train.target_loss(model, ids, target)
    masked = train.target_loss(model, ids, target, train.bottleneck_mask(ids, wide, header))
    torch.testing.assert_close(masked, plain)
    narrow = train.target_loss(model, ids, target, train.bottleneck_mask(ids, ~wide, header))
    assert float(narrow) != float(plain)


def test_micro_batches_hold_every_row_once_with_the_fewest_pads():
    rows = train.encode(TOKENIZER, SAMPLE[:10])
    batches = train.micro_batches(rows, 4, TOKENIZER.pad_token_id)
    assert [len(ids) for ids, _ in batches] == [3, 3, 3, 1]
    found = [
        (ids[ids != 0].tolist(), target[ids != 0].tolist())
        for batch in batches
        for ids, target in zip(*batch, strict=True)
    ]
    given = [(ids.tolist(), target.tolist()) for ids, target in rows]
    assert sorted(found) == sorted(given)
    assert all(not target[ids == 0].any() for ids, target in batches)
    widths = [ids.shape[1] for ids, _ in batches]
    assert widths == sorted(widths) and widths[-1] == max(len(ids) for ids, _ in rows)


def test_the_dialogues_of_a_step_depend_on_seed_and_step_alone(monkeypatch):
    seen = []
    encode = train.encode
    monkeypatch.setattr(train, "encode", lambda t, batch: seen.append(batch) or encode(t, batch))
    train.train_model(tiny(), TOKENIZER, **RUN)
    train.train_model(tiny(num_hidden_layers=1), TOKENIZER, **{**RUN, "steps": 2, "parts": 1})
    assert seen[:2] == seen[4:]
    assert seen[0] != seen[1]


def test_the_rate_warms_up_and_decays_to_a_hundredth():
    rates = [train.schedule(step, 3200) for step in range(3200)]
    assert rates[0] == 1 / 50 and max(rates) == rates[49] == rates[50] == 1
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == 0.01 and rates[1625] == pytest.approx(0.5)
    assert all(0 < train.schedule(step, 3) <= 1 for step in range(3))


def test_each_parameter_has_one_optimizer_and_only_the_blocks_matrices_have_muon():
    model = tiny()
    muon, adamw = train.optimizers(model, 1e-3)
    groups = [[p for g in o.param_groups for p in g["params"]] for o in (muon, adamw)]
    names = {id(p): name for name, p in model.named_parameters()}
    inner, outer = ({names[id(p)] for p in group} for group in groups)
    assert len(groups[0]) + len(groups[1]) == len(names)
    assert inner | outer == set(names.values()) and not inner & outer
    assert outer == {n for n in names.values() if "norm" in n} | {"model.embed_tokens.weight"}


def test_the_embedded_models_shape_and_start_come_from_its_seed():
    model = train.new_model(TOKENIZER, 5)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size) == (8, 192)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert equal(weights(model), weights(train.new_model(TOKENIZER, 5)))
    assert not equal(weights(model), weights(train.new_model(TOKENIZER, 6)))


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
    train.train_model(model, TOKENIZER, **RUN, state=tmp_path / "state.safetensors")
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
    monkeypatch.setattr(train, "train_tokenizer", lambda stream: TOKENIZER)
    app = train.typer.Typer()
    app.command()(train.train)
    out, state = tmp_path / "mini", tmp_path / "state.safetensors"
    options = f"--out {out} --state {state} --steps 2 --batch 4 --learning-rate 0.001 --seed 1"
    options += " --device cpu --threads 1 --save-every 1 --parts 2"
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
