from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lenskit._data
import lenskit.models.loading
from lenskit.capture import capture
from lenskit.cli import app
from lenskit.generation import generate
from lenskit.models import (
    PLAIN_TEMPLATE,
    ModelCheckError,
    Tokens,
    chat_ids,
    check_model,
    hugging_face,
    load_model,
    load_tokenizer,
    model_fingerprint,
    model_report,
    pad_left,
    position_ids,
)
from lenskit.models.templates import prepare_tokenizer
from lenskit.prompts import build_prompts

USER = [{"role": "user", "content": "What do you think of rain?"}]
TURNS = [*USER, {"role": "assistant", "content": "It is wet."}, {"role": "user", "content": "So?"}]
EDITABLE = [name for name in tiny.ARCHITECTURES if name not in tiny.DISCARD_EDITS]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_equals_hugging_face_when_it_is_loaded(architecture):
    model = load_model(tiny.shared_folder(architecture), device="cpu")
    report = model_report(model)
    assert report.pattern_error < 1e-5
    assert report.resid_error < 1e-5
    assert {"hook_resid_post", "attn.hook_pattern"} <= set(report.fires)
    assert not model.training


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_of_padded_prompts_equal_those_of_a_separately_loaded_model(architecture):
    model = tiny.shared_model(architecture)
    reference = tiny.reference_model(tiny.shared_folder(architecture))
    tokens = chat_ids(model, [USER, TURNS])
    with torch.no_grad():
        ours = model(tokens.input_ids, attention_mask=tokens.attention_mask)[:, -1]
        for row, length in enumerate(tokens.lengths.tolist()):
            theirs = reference(tokens.input_ids[row : row + 1, -length:]).logits[0, -1]
            torch.testing.assert_close(ours[row], theirs, atol=2e-5, rtol=1e-5)


def test_a_separately_loaded_reference_can_be_given_to_the_check():
    model = tiny.shared_model()
    report = check_model(model, tiny.reference_model(tiny.shared_folder()))
    assert report.pattern_error == 0
    assert report.resid_error == 0


def test_other_weights_in_the_reference_are_noticed_in_every_block(tmp_path):
    other = tiny.reference_model(tiny.tiny_folder(tmp_path, seed=1))
    with pytest.raises(ModelCheckError, match="block 0 is off.*block 2 is off"):
        check_model(tiny.shared_model(), other)


def test_a_reference_without_eager_attention_is_refused():
    fused = AutoModelForCausalLM.from_pretrained(
        tiny.shared_folder(), attn_implementation="sdpa", dtype=torch.float32
    )
    with pytest.raises(ModelCheckError, match="eager"):
        check_model(tiny.shared_model(), fused)


def test_a_pattern_that_does_not_sum_to_one_is_refused_by_block():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)
    halve = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern / 2)
    with model.hooks(fwd_hooks=[halve]), pytest.raises(ModelCheckError, match="block 1 .*sum"):
        check_model(model)


def test_a_cache_that_is_dropped_is_refused_since_generation_would_be_wrong():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)

    def without_cache(module, args, kwargs):
        return args, kwargs | {"past_key_values": None}

    handle = model.original_model.register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.raises(ModelCheckError, match="a cached step differs from an uncached pass"):
        check_model(model)
    handle.remove()
    check_model(model)


def test_logits_that_are_not_finite_are_refused():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)
    with torch.no_grad():
        next(model.original_model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelCheckError, match="not finite"):
        check_model(model)


@pytest.mark.parametrize("architecture", EDITABLE)
def test_edits_of_residuals_scores_and_patterns_take_effect(architecture):
    report = model_report(tiny.shared_model(architecture))
    assert report.edits == ("hook_resid_post", "attn.hook_attn_scores", "attn.hook_pattern")
    report.require_edit("attn.hook_attn_scores")


@pytest.mark.parametrize("architecture", tiny.DISCARD_EDITS)
def test_edits_that_a_model_discards_are_reported_and_refused_when_required(architecture):
    report = model_report(tiny.shared_model(architecture))
    assert report.edits == ("hook_resid_post",)
    report.require_edit("hook_resid_post")
    with pytest.raises(ModelCheckError, match="attn.hook_attn_scores does not change"):
        report.require_edit("attn.hook_attn_scores")


def test_checking_a_model_leaves_no_hook_behind():
    model = tiny.shared_model()
    check_model(model)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_bfloat16_is_loaded_and_checked_on_request():
    model = load_model(tiny.shared_folder(), device="cpu", dtype="bfloat16")
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
    assert model_report(model).pattern_error < 3e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "gemma2", "gemma3", "olmo2", "phi3"])
def test_a_capture_in_half_precision_is_finite_and_close_to_float32(architecture, dtype):
    full = tiny.shared_model(architecture)
    half = load_model(tiny.shared_folder(architecture), device="cpu", dtype=dtype)
    statements = ["Rain.", "Libraries should stay open on Sundays, and nobody should pay."]
    prompts = build_prompts(full, "Take on a cheerful mood.", statements=statements)
    theirs, ours = (capture(each, prompts, progress=False) for each in (full, half))
    rounding = 0.1 if dtype == "bfloat16" else 0.01
    for name in ("attention_to_prefix", "resid_post"):
        expected, found = getattr(theirs, name), getattr(ours, name)
        assert found.dtype == torch.float32 and bool(found.isfinite().all())
        assert (found - expected).abs().max() < rounding * expected.abs().max()
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        {"": "cpu"},
        {"model.embed_tokens": "cpu", "model.layers": "cpu"}
        | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
    ],
)
def test_a_model_placed_by_a_device_map_is_the_same(device_map):
    pytest.importorskip("accelerate")
    model = load_model(tiny.shared_folder(), device_map=device_map)
    assert model.original_model.dtype == torch.float32
    assert model_report(model).pattern_error < 1e-5
    assert model_fingerprint(model) == model_fingerprint(tiny.shared_model())
    assert generate(model, "Why?", max_new_tokens=4) == generate(
        tiny.shared_model(), "Why?", max_new_tokens=4
    )


def test_weights_that_are_left_on_the_disk_are_refused(tmp_path):
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="leaves weights on disk.*4bit"):
        load_model(tiny.shared_folder(), device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_quantized_weights_are_loaded_and_checked(tmp_path):
    pytest.importorskip("bitsandbytes")
    # Weights are packed in blocks of 64.
    folder = tiny.tiny_folder(tmp_path, hidden_size=64, intermediate_size=128)
    model = load_model(folder, device="cpu", dtype="float32", quantization="4bit")
    names = {type(module).__name__ for module in model.original_model.modules()}
    assert "Linear4bit" in names
    assert model_report(model).pattern_error < 1e-5
    full = load_model(folder, device="cpu", check=False)
    assert model_fingerprint(model) != model_fingerprint(full)


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("accelerate", {"device_map": "auto"}, "device_map='auto' needs accelerate.*pip install"),
        ("accelerate", {"quantization": "4bit"}, "quantization='4bit' needs accelerate"),
        ("bitsandbytes", {"quantization": "4bit"}, "needs bitsandbytes, which is not installed"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, missing, arguments, message):
    found = {"accelerate", "bitsandbytes"} - {missing}
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: name in found or None)
    with pytest.raises(ImportError, match=message):
        load_model(tiny.shared_folder(), **arguments)


def test_a_device_and_a_device_map_are_not_both_taken():
    with pytest.raises(ValueError, match="device or device_map"):
        load_model(tiny.shared_folder(), device="cpu", device_map="auto")


def test_fused_projections_in_packed_weights_are_refused_with_the_reason(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("cannot split a fused QKV projection")

    monkeypatch.setattr(lenskit.models.loading.TransformerBridge, "boot_transformers", refuse)
    with pytest.raises(ModelCheckError, match="cannot open .*Llama.*: cannot split a fused QKV"):
        load_model(tiny.shared_folder(), device="cpu")


def test_attention_that_sinks_may_take_part_of_is_not_refused(tmp_path):
    folder = tiny.tiny_folder(tmp_path, "gpt_oss")
    assert model_report(load_model(folder, device="cpu")).pattern_error < 1e-5
    assert model_report(load_model(folder, device="cpu", check="hooks")).edits


def test_a_model_that_the_bridge_cannot_run_in_a_dtype_is_refused_with_a_way_out():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)
    model.original_model.lm_head.to(torch.bfloat16)
    with pytest.raises(ModelCheckError, match="float32"):
        check_model(model)


def test_without_a_check_the_report_is_made_when_it_is_asked_for():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)
    report = model_report(model)
    assert report.pattern_error is None
    assert report.blocks == 3 and report.heads == 4 and report.d_model == 32
    assert model_report(model) is report


def test_a_model_in_memory_is_wrapped_as_it_is():
    loaded = AutoModelForCausalLM.from_pretrained(tiny.shared_folder(), dtype=torch.float32)
    model = load_model(tiny.shared_folder(), hf_model=loaded)
    assert model.original_model is loaded
    assert model_report(model).pattern_error < 1e-5
    assert model_fingerprint(model) == model_fingerprint(tiny.shared_model())


def test_a_model_in_memory_brings_the_tokenizer_of_its_folder_and_never_another():
    loaded = tiny.reference_model(tiny.shared_folder())
    model = load_model(hf_model=loaded, check="hooks")
    assert model.tokenizer.chat_template == tiny.LLAMA3_TEMPLATE
    assert len(model.tokenizer) == 420
    assert model_fingerprint(model) == model_fingerprint(tiny.shared_model())
    made = type(loaded)(loaded.config.__class__(**tiny.ARCHITECTURES["llama-gqa"][1]))
    with pytest.raises(ValueError, match="made in memory.*tokenizer="):
        load_model(hf_model=made)
    made.config._name_or_path = "/nowhere/at/all"
    with pytest.raises(ValueError, match="'/nowhere/at/all'.*tokenizer="):
        load_model(hf_model=made)
    model = load_model(hf_model=made, tokenizer=tiny.tiny_tokenizer())
    assert model_fingerprint(model).startswith("all:")


@pytest.mark.parametrize(
    "architecture", ["cohere", "falcon", "arcee", "deepseek_v2", "gpt_bigcode"]
)
def test_a_model_made_in_memory_is_known_by_its_class(architecture):
    made = tiny.tiny_hugging_face(architecture)
    assert made.config.architectures is None
    model = load_model(hf_model=made.eval(), tokenizer=tiny.tiny_tokenizer())
    assert model.cfg.architecture == type(made).__name__
    assert model_report(model).pattern_error < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "there is no folder '/nowhere/model'"),
        ("./nope", r"there is no folder './nope' \(looked from "),
        ("models/llama/3", "there is no folder 'models/llama/3'"),
        (Path("model"), "there is no folder 'model'"),
        (__file__, "is a file; give the folder"),
    ],
)
def test_a_folder_that_is_not_there_is_said_to_be_missing(name, message):
    with pytest.raises(OSError, match=message):
        load_model(name)


def test_a_hub_id_that_cannot_be_had_may_be_a_mistyped_folder(monkeypatch):
    def unreachable(name, file, **options):
        raise OSError("no connection")

    monkeypatch.setattr(hugging_face, "cached_file", unreachable)
    with pytest.raises(OSError, match="no folder 'models/llama' in /.*hub: no connection"):
        load_model("models/llama")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is no device that torch knows; try 'cpu'"),
        ({"device": "cuda:97"}, "device 'cuda:97' is not on this machine: torch sees "),
        ({"device_map": {"": 97}}, "device_map 'cuda:97' is not on this machine"),
    ],
)
def test_a_device_that_is_not_there_is_named_before_anything_is_read(arguments, message):
    if "device_map" in arguments:
        pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=message):
        load_model(tiny.shared_folder(), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(ValueError, match="'cuda' is not on this machine: torch sees no GPU"):
        load_model(tiny.shared_folder(), device="cuda")


@pytest.mark.parametrize(
    "error", [AssertionError("heads"), AttributeError("heads"), KeyError("heads")]
)
def test_whatever_fails_while_a_bridge_is_made_is_the_reason_of_a_refusal(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(lenskit.models.loading.TransformerBridge, "boot_transformers", fail)
    with pytest.raises(ModelCheckError, match="cannot open .*Llama.*heads"):
        load_model(tiny.shared_folder(), device="cpu")


def test_whatever_fails_while_hooks_are_read_is_the_reason_and_no_dtype_is_blamed():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)

    def fail(resid, hook):
        raise AssertionError("an odd block")

    fails = [("blocks.1.hook_resid_post", fail)]
    with model.hooks(fwd_hooks=fails), pytest.raises(ModelCheckError, match="an odd block$"):
        check_model(model)


def test_a_checkpoint_that_transformers_cannot_open_is_refused_with_the_reason(tmp_path):
    folder = tiny.tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "nonesuch"}))
    with pytest.raises(ModelCheckError, match="cannot be opened by transformers: .*nonesuch"):
        load_model(folder, device="cpu")


CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize(
    "opened", ["load_model", "load_tokenizer", "load_hugging_face", "check", "plan"]
)
def test_code_in_a_folder_is_not_run_though_the_terminal_says_yes(opened, tmp_path, monkeypatch):
    folder, mark = tiny.tiny_folder(tmp_path / "model"), tmp_path / "was run"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    for file, changes in (
        ("config.json", {"auto_map": classes, "model_type": "own"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}),
    ):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, **changes}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    for asked in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        if opened in ("check", "plan"):
            assert CliRunner().invoke(app, [opened, str(folder)], input="y\n" * 9).exit_code == 1
            continue
        try:
            getattr(lenskit.models, opened)(str(folder), **asked)
        except (ValueError, ModelCheckError) as error:
            assert "trust_remote_code" in str(error) or "own" in str(error)
    assert not mark.exists()


def test_the_embedded_model_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(lenskit._data, "data_path", lambda name: tiny.shared_folder())
    assert load_model("lenskit-mini", device="cpu", check=False).cfg.d_model == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"check": "all"}, "check must be"),
        ({"dtype": "float31"}, "float31"),
        ({"dtype": "nn"}, "nn"),
        ({"quantization": "8bit"}, "quantization must be '4bit'.*'8bit'.*hf_model"),
    ],
)
def test_unknown_options_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(tiny.shared_folder(), device="cpu", **arguments)


def test_a_loaded_model_keeps_its_own_device_and_dtype():
    loaded = tiny.reference_model(tiny.shared_folder())
    with pytest.raises(ValueError, match="device, dtype"):
        load_model(tiny.shared_folder(), hf_model=loaded, dtype="float32")


def test_the_fingerprint_tells_weights_apart_and_not_dtypes(tmp_path):
    first = model_fingerprint(tiny.shared_model())
    half = load_model(tiny.shared_folder(), device="cpu", dtype="bfloat16", check=False)
    other = load_model(
        tiny.tiny_folder(tmp_path / "tiny-llama-gqa", seed=1), device="cpu", check=False
    )
    assert first.startswith("tiny-llama-gqa:")
    assert model_fingerprint(half) == first
    assert model_fingerprint(other) != first
    assert model_fingerprint(other).split(":")[0] == first.split(":")[0]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_tokenizer_is_the_one_in_the_folder(architecture):
    # A qwen2 config makes AutoTokenizer split numbers, whatever tokenizer.json says.
    tokenizer, written = tiny.shared_model(architecture).tokenizer, tiny.tiny_tokenizer()
    text = "In 1984,  naïve 北京 people\n\nsaid:<|eot_id|>"
    assert tokenizer(text)["input_ids"] == written(text)["input_ids"]
    assert tokenizer.chat_template == tiny.LLAMA3_TEMPLATE
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text[:-10]


def test_a_given_tokenizer_is_the_very_object_on_the_model_and_stays_without_bos():
    tokenizer = tiny.tiny_tokenizer(adds_bos=False)
    tokenizer.bos_token = None
    tokenizer.chat_template = tiny.LLAMA3_TEMPLATE.replace("{{ bos_token }}", "")
    model = load_model(tiny.shared_folder(), device="cpu", tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    assert tokenizer.bos_token is None
    assert model.tokenizer.decode(chat_ids(model, [USER]).input_ids[0, 0]) == "<|start_header_id|>"


def test_a_missing_pad_token_is_replaced_by_the_end_token():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = None
    assert prepare_tokenizer(tokenizer).pad_token == "<|eot_id|>"


def test_a_pad_token_outside_the_embedding_is_replaced():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    assert tokenizer.pad_token_id == 420
    model = load_model(tiny.shared_folder(), device="cpu", tokenizer=tokenizer)
    assert model.tokenizer.pad_token == "<|eot_id|>"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_base_model_gets_the_plain_template(tmp_path, adds_bos):
    plain = tiny.tiny_tokenizer(template=None, adds_bos=adds_bos)
    path = tiny.tiny_folder(tmp_path, tokenizer=plain)
    tokenizer = load_tokenizer(str(path))
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, *TURNS],
        tokenize=False,
        add_generation_prompt=True,
    )
    begin = "<|begin_of_text|>" if adds_bos else ""
    assert text == (
        f"{begin}Be kind.\n\nUser: What do you think of rain?\n"
        "Assistant: It is wet.\nUser: So?\nAssistant:"
    )
    assert tokenizer.chat_template.endswith(PLAIN_TEMPLATE)


def test_a_template_that_doubles_the_bos_is_refused():
    tokenizer = tiny.tiny_tokenizer(template="{{ bos_token }}" + tiny.LLAMA3_TEMPLATE)
    with pytest.raises(ValueError, match="twice"):
        prepare_tokenizer(tokenizer)


def test_chat_ids_are_those_of_the_template_with_one_bos_and_left_padding():
    model = tiny.shared_model()
    tokens = chat_ids(model, [USER, TURNS])
    theirs = tiny.tiny_tokenizer().apply_chat_template(
        [USER, TURNS],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    assert torch.equal(tokens.input_ids, theirs["input_ids"])
    assert torch.equal(tokens.attention_mask, theirs["attention_mask"])
    assert (tokens.input_ids == model.tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]


def test_template_arguments_reach_the_template(tmp_path):
    template = tiny.LLAMA3_TEMPLATE + "{% if not thinking %}Statement{% endif %}"
    model = tiny.shared_model()
    changed = load_model(
        tiny.shared_folder(),
        device="cpu",
        check=False,
        tokenizer=tiny.tiny_tokenizer(template=template),
    )
    assert torch.equal(
        chat_ids(changed, [USER], template_arguments={"thinking": True}).input_ids,
        chat_ids(model, [USER]).input_ids,
    )
    assert len(chat_ids(changed, [USER]).input_ids[0]) > len(chat_ids(model, [USER]).input_ids[0])


def test_no_conversation_at_all_is_an_error():
    with pytest.raises(ValueError, match="conversations is empty"):
        chat_ids(tiny.shared_model(), [])


def test_positions_count_from_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_tokens_refuse_right_padding_and_unequal_shapes():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="left"):
        Tokens(ids, torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="pos"):
        Tokens(ids, torch.ones(1, 2, dtype=torch.long))


def test_tokens_of_some_rows_can_be_trimmed_of_common_padding():
    tokens = pad_left([[7], [7, 8, 9], [8, 9]], pad_token_id=5)
    some = tokens.rows([2, 0])
    assert some.input_ids.tolist() == [[5, 8, 9], [5, 5, 7]]
    assert some.trimmed().input_ids.tolist() == [[8, 9], [5, 7]]
    assert some.trimmed().attention_mask.tolist() == [[1, 1], [0, 1]]
    assert tokens.lengths.tolist() == [1, 3, 2]
    assert len(tokens) == 3
