from __future__ import annotations

import pytest
import tiny
import torch
from test_capture import STATEMENTS, prompts_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lenskit.capture import _eager, capture, for_each_pattern
from lenskit.models import fused, load_model, rows
from lenskit.prompts import build_prompts

# The bridges of these compute attention themselves, or their models do, past AttentionInterface.
EAGER_ONLY = {"bloom", "gptj"}
FUSED = [name for name in tiny.ARCHITECTURES if name not in EAGER_ONLY]
SINKS = (
    "GptOss",
    dict(
        tiny._HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=tiny._WINDOWS,
    ),
)


def both(model, prompts, **options):
    """A capture from eager attention, and from fused attention or not at all."""
    return [
        capture(model, prompts, attention=attention, progress=False, **options)
        for attention in ("eager", "fused")
    ]


def assert_close(eager, quick, tolerance=1e-5):
    largest = eager.resid_post.abs().max()
    assert (quick.resid_post - eager.resid_post).abs().max() <= tolerance * largest
    masses = quick.attention_to_prefix - eager.attention_to_prefix
    assert masses.abs().max() <= tolerance
    assert eager.attention_to_prefix.max() > 0.05


def loaded(path, architecture="llama-gqa", *, dtype=None, **overrides):
    """A model of its own, whose parts a test may alter."""
    folder = tiny.tiny_folder(path, architecture, **overrides)
    return load_model(folder, device="cpu", dtype=dtype, check="hooks")


def attention_modules(model):
    """What stands in the place of attention in each of Hugging Face's blocks."""
    return [block.original_component.self_attn for block in model.blocks]


def logits(model, prompts):
    tokens = prompts.tokens
    with torch.no_grad():
        return model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_attention_gives_the_capture_of_eager_attention(architecture):
    model = tiny.shared_model(architecture)
    eager, quick = both(model, prompts_for(model), batch_size=4)
    assert_close(eager, quick)
    auto = capture(model, prompts_for(model), batch_size=4, progress=False)
    assert torch.equal(auto.resid_post, quick.resid_post)


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_attention_gives_the_pattern_rows_of_eager_attention(architecture):
    model = tiny.shared_model(architecture)
    prompts = prompts_for(model)
    seen = {}
    for attention in ("eager", "fused"):

        def visit(layer, index, pattern, mask, attention=attention):
            assert (pattern[~mask[:, None, None].expand_as(pattern)] == 0).all()
            for row, rows_of_prompt in zip(index.tolist(), pattern, strict=True):
                seen[attention, layer, row] = rows_of_prompt.clone()

        for_each_pattern(
            model, prompts.tokens, 7, visit, batch_size=3, attention=attention, progress=False
        )
    for layer in range(3):
        for row in range(len(prompts)):
            eager, quick = seen["eager", layer, row], seen["fused", layer, row]
            torch.testing.assert_close(quick, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", sorted(EAGER_ONLY))
def test_architectures_without_the_interface_are_read_from_eager_attention(architecture):
    model = tiny.shared_model(architecture)
    prompts = prompts_for(model)
    eager = capture(model, prompts, attention="eager", progress=False)
    auto = capture(model, prompts, progress=False)
    assert torch.equal(auto.resid_post, eager.resid_post)
    assert torch.equal(auto.attention_to_prefix, eager.attention_to_prefix)
    with pytest.raises(ValueError, match="attention='fused' cannot be had: pattern of block 0"):
        capture(model, prompts, attention="fused", progress=False)


def test_soft_capping_is_part_of_the_rows(tmp_path):
    capped = loaded(tmp_path / "a", "gemma2", attn_logit_softcapping=1.0)
    free = loaded(tmp_path / "b", "gemma2", attn_logit_softcapping=None)
    prompts = prompts_for(capped)
    one, other = both(capped, prompts), both(free, prompts)
    assert_close(*one)
    assert_close(*other)
    assert (one[1].attention_to_prefix - other[1].attention_to_prefix).abs().max() > 1e-2


def test_a_window_narrower_than_the_prompt_hides_the_same_keys(tmp_path):
    model = loaded(tmp_path, "mistral-window", sliding_window=20)
    prompts = prompts_for(model)
    assert prompts.tokens.lengths.max() > 2 * 20 > 20 > prompts.tokens.lengths.min() / 2
    seen = []

    def visit(layer, index, pattern, mask):
        seen.append((pattern[:, :, -1] > 0).sum(dim=-1).max().item())

    for_each_pattern(model, prompts.tokens, 5, visit, attention="fused", progress=False)
    assert seen == [20, 20, 20]


def test_a_sink_takes_its_share_before_the_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "gpt_oss", SINKS)
    model = loaded(tmp_path, "gpt_oss")
    prompts = prompts_for(model)
    assert_close(*both(model, prompts))
    sums = []

    def visit(layer, index, pattern, mask):
        sums.append(pattern.sum(dim=-1).min().item())

    for_each_pattern(model, prompts.tokens, 5, visit, attention="fused", progress=False)
    assert 0 < min(sums) < 0.99


@pytest.mark.parametrize("architecture", ["gemma2", "mistral-window", "gpt_oss"])
def test_attention_in_small_pieces_is_the_same(architecture, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "gpt_oss", SINKS)
    model = loaded(tmp_path, architecture)
    prompts = prompts_for(model)
    whole = capture(model, prompts, attention="fused", progress=False)
    monkeypatch.setattr(rows, "_CHUNK", {"cpu": 9000})
    pieces = capture(model, prompts, attention="fused", progress=False)
    torch.testing.assert_close(pieces.resid_post, whole.resid_post, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        pieces.attention_to_prefix, whole.attention_to_prefix, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_to_rounding(tmp_path, dtype):
    model = loaded(tmp_path, dtype=dtype)
    eager, quick = both(model, prompts_for(model))
    assert quick.resid_post.dtype == torch.float32
    assert_close(eager, quick, tolerance=0.1 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(fails):
    model = tiny.shared_model()
    prompts = prompts_for(model)
    before, modules = logits(model, prompts), attention_modules(model)
    assert modules == [block.attn for block in model.blocks]

    def visit(layer, index, pattern, mask):
        assert not set(attention_modules(model)) & set(modules)
        if fails and layer == 1:
            raise KeyError("from the visitor")

    def read():
        for_each_pattern(model, prompts.tokens, 5, visit, attention="fused", progress=False)

    if fails:
        with pytest.raises(KeyError, match="from the visitor"):
            read()
    else:
        read()
    assert all(a is b for a, b in zip(attention_modules(model), modules, strict=True))
    assert model.original_model.config._attn_implementation == "eager"
    assert not rows.reading
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert torch.equal(logits(model, prompts), before)


def test_nothing_behind_the_last_attention_wanted_is_run():
    model = tiny.shared_model()

    def refuse(module, arguments):
        raise AssertionError("a later module was run")

    behind = [model.blocks[1].original_component.mlp, model.original_model.lm_head]
    handles = [module.register_forward_pre_hook(refuse) for module in behind]
    try:
        layers = []
        for_each_pattern(
            model,
            prompts_for(model).tokens,
            1,
            lambda layer, *_: layers.append(layer),
            blocks=[0, 1],
            attention="fused",
            progress=False,
        )
        assert layers == [0, 1]
        handles.pop(0).remove()
        capture(model, prompts_for(model), attention="fused", progress=False)
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_of_others_are_not_passed_over():
    model = tiny.shared_model()
    prompts = prompts_for(model)

    def first_key(pattern, hook):
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([pattern.shape[-1] - 1]), 1.0)

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", first_key)]):
        edited = capture(model, prompts, progress=False)
        with pytest.raises(ValueError, match="hooks are set on the model"):
            capture(model, prompts, attention="fused", progress=False)
    assert (edited.attention_to_prefix[:, 0] == 0).all()
    assert capture(model, prompts, progress=False).attention_to_prefix[:, 0].max() > 0


def given_a_bias(model, longer_than: int):
    """The second block's attention hands its function a bias, for prompts longer than that."""
    native = model.blocks[1].attn.original_component
    forward = native.forward

    def biased(hidden_states, *arguments, **options):
        if hidden_states.shape[1] > longer_than:
            options["position_bias"] = torch.zeros(1)
        return forward(hidden_states, *arguments, **options)

    native.forward = biased


def test_what_is_not_understood_leads_to_the_eager_pass(tmp_path):
    model = loaded(tmp_path)
    given_a_bias(model, longer_than=0)
    prompts = prompts_for(model)
    eager = capture(model, prompts, attention="eager", progress=False)
    assert torch.equal(capture(model, prompts, progress=False).resid_post, eager.resid_post)
    with pytest.raises(ValueError, match="the attention function is given position_bias"):
        capture(model, prompts, attention="fused", progress=False)


def test_what_is_not_understood_in_a_later_batch_does_so_too(tmp_path):
    model = loaded(tmp_path)
    prompts = prompts_for(model)
    given_a_bias(model, longer_than=60)
    assert fused.obstacle(model, _eager) == ""
    eager = capture(model, prompts, attention="eager", batch_size=2, progress=False)
    found = capture(model, prompts, batch_size=2, progress=False)
    assert torch.equal(found.resid_post, eager.resid_post)
    assert "position_bias" in fused.obstacle(model, _eager)


def test_rows_that_differ_in_the_trial_are_never_used(tmp_path, monkeypatch):
    model = loaded(tmp_path)
    prompts = prompts_for(model)
    monkeypatch.setattr(rows, "_pattern", lambda *given, right=rows._pattern: right(*given) + 1e-4)
    with pytest.raises(ValueError, match="pattern of block 0 differs .* by 0.0001"):
        capture(model, prompts, attention="fused", progress=False)
    eager = capture(model, prompts, attention="eager", progress=False)
    found = capture(model, prompts, progress=False)
    assert torch.equal(found.attention_to_prefix, eager.attention_to_prefix)


def test_an_unknown_kind_of_attention_is_refused():
    model = tiny.shared_model()
    with pytest.raises(ValueError, match="attention must be one of auto, eager, fused"):
        capture(model, prompts_for(model), attention="flash", progress=False)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor(model, attention: str, words: int) -> int:
    statements = [text + " and so on" * words for text in STATEMENTS[:2]]
    prompts = build_prompts(model, "Take on a cheerful mood.", statements=statements)
    with Largest() as largest:
        capture(model, prompts, attention=attention, progress=False)
    return largest.elements // int(prompts.tokens.lengths.max())


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "qwen3"])
def test_memory_does_not_grow_with_the_squared_length(architecture):
    model = tiny.shared_model(architecture)
    capture(model, prompts_for(model), progress=False)
    few, many = (largest_tensor(model, "fused", words) for words in (20, 60))
    assert many <= few * 1.01
    few, many = (largest_tensor(model, "eager", words) for words in (20, 60))
    assert many > 2 * few
