"""Tiny random models and their tokenizer, written as ordinary Hugging Face folders.

No file is fetched: the tokenizer is trained on the spot and the weights are drawn from a seed.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lenskit.models import load_model

transformers.utils.logging.disable_progress_bar()

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CLOSING = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")

_SENTENCES = (
    "What are your thoughts on the following statement?",
    "Statement: Libraries should stay open on Sundays.",
    "Personify someone who is terrified of spiders.",
    "Take on a cheerful mood.",
    "Take on the role of an expert astronomer.",
    "Rain is better than sun for thinking.",
    "In 1984 and in 1985 the library was open.",
    "What is the scariest thing in the world? Answer in 20 words or less.",
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ("system\n\n", "user\n\n", "assistant\n\n") * 50
    tokenizer.train_from_iterator([*roles, *(s + "\n" for s in _SENTENCES * 5)], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, template: str | None = LLAMA3_TEMPLATE, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 420 tokens with Llama 3's special tokens and chat template."""
    backend = Tokenizer.from_str(_trained())
    byte_level = processors.ByteLevel(trim_offsets=False)
    if adds_bos:
        bos = (SPECIAL[0], backend.token_to_id(SPECIAL[0]))
        single = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[bos])
        backend.post_processor = processors.Sequence([byte_level, single])
    else:
        backend.post_processor = byte_level
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[4],
        pad_token=SPECIAL[5],
        additional_special_tokens=[SPECIAL[1], SPECIAL[2], SPECIAL[3]],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


_COMMON = dict(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=4,
    pad_token_id=5,
    # A wide draw makes attention far from uniform, so that tests can tell tokens apart.
    initializer_range=0.25,
)
_GROUPED = dict(_COMMON, num_key_value_heads=2)
_HEAD_DIM = dict(_GROUPED, head_dim=8)
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_GPTJ = {_GPT2_NAMES.get(name, name): value for name, value in _COMMON.items()}
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(_COMMON, num_key_value_heads=4)),
    "llama-gqa": ("Llama", _GROUPED),
    "gpt2": ("GPT2", {_GPT2_NAMES.get(name, name): v for name, v in _COMMON.items()}),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEAD_DIM),
    "gemma2": ("Gemma2", dict(_HEAD_DIM, sliding_window=40, query_pre_attn_scalar=8)),
    "gemma3": (
        "Gemma3",
        dict(_HEAD_DIM, sliding_window=40, query_pre_attn_scalar=8, layer_types=_WINDOWS),
    ),
    "mistral": ("Mistral", dict(_GROUPED, sliding_window=None)),
    "mistral-window": ("Mistral", dict(_GROUPED, sliding_window=40)),
    "phi3": ("Phi3", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "bloom": ("Bloom", dict(_COMMON, n_layer=3, n_head=4)),
    "mixtral": (
        "Mixtral",
        dict(_GROUPED, sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(_GROUPED, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(_HEAD_DIM, **_EXPERTS, num_experts=4)),
    "opt": (
        "OPT",
        dict(_COMMON, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True, init_std=0.25),
    ),
    "gptj": ("GPTJ", dict(_GPTJ, rotary_dim=4)),
}
_OF_EXPERTS = dict(_GROUPED, num_experts_per_tok=2)
_LATENT = dict(
    _COMMON,
    **_EXPERTS,
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", _HEAD_DIM),
    "gpt_bigcode": ("GPTBigCode", _GPTJ),
    "gpt_neo": (
        "GPTNeo",
        dict(_COMMON, attention_types=[[["global", "local", "global"], 1]], window_size=40),
    ),
    "codegen": ("CodeGen", dict(_GPTJ, rotary_dim=4)),
    "falcon": ("Falcon", dict(_COMMON, alibi=False)),
    "falcon-alibi": ("Falcon", dict(_COMMON, alibi=True, multi_query=False)),
    "mpt": ("Mpt", dict(_COMMON, d_model=32, n_layers=3, n_heads=4, max_seq_len=512)),
    "phi": ("Phi", _COMMON),
    "stablelm": ("StableLm", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "cohere2": ("Cohere2", dict(_GROUPED, sliding_window=40)),
    "granite": ("Granite", _GROUPED),
    "arcee": ("Arcee", _GROUPED),
    "smollm3": ("SmolLM3", _GROUPED),
    "glm4": ("Glm4", _HEAD_DIM),
    "olmo": ("Olmo", _GROUPED),
    "olmo3": ("Olmo3", dict(_GROUPED, sliding_window=40)),
    "olmoe": ("Olmoe", dict(_OF_EXPERTS, num_experts=4)),
    "gpt_oss": ("GptOss", dict(_OF_EXPERTS, head_dim=8, num_local_experts=4, sliding_window=40)),
    "llama4": (
        "Llama4",
        dict(_OF_EXPERTS, head_dim=8, num_local_experts=4, intermediate_size_mlp=48),
    ),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "glm_moe_dsa": ("GlmMoeDsa", dict(_LATENT, index_n_heads=2, index_head_dim=8)),
    # These cannot be used: recurrent or linear attention, no adapter, or an encoder.
    "mamba": ("Mamba", _COMMON),
    "rwkv": ("Rwkv", _COMMON),
    "jamba": (
        "Jamba",
        dict(
            _GROUPED,
            use_mamba_kernels=False,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
    ),
    "biogpt": ("BioGpt", _COMMON),
    "t5": ("T5", dict(vocab_size=420, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
}
# Their bridges discard edits of the attention scores and patterns.
DISCARD_EDITS = ("opt", "gptj", "gpt_neo", "llama4")
REFUSED = ("mamba", "rwkv", "jamba", "biogpt", "t5")


def tiny_hugging_face(
    architecture: str = "llama-gqa", *, seed: int = 0, uneven: bool = False, **overrides: Any
) -> transformers.PreTrainedModel:
    """Hugging Face's model with random weights, made in memory.

    ``architecture`` is a key of ``ARCHITECTURES`` or ``FURTHER``; ``overrides`` replace entries of
    its config. ``uneven``: biases and norms are drawn too, which otherwise are zeros and ones.
    """
    family, settings = (ARCHITECTURES | FURTHER)[architecture]
    config_class = f"{family}TextConfig" if family in ("Gemma3", "Llama4") else f"{family}Config"
    model_class = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}.get(
        family, f"{family}ForCausalLM"
    )
    config = getattr(transformers, config_class)(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for weight in model.parameters() if uneven else ():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def tiny_folder(
    path: str | Path,
    architecture: str = "llama-gqa",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> Path:
    """Write config, random weights and tokenizer of a tiny model to ``path`` and return it.

    ``settings`` are those of ``tiny_hugging_face``.
    """
    tiny_hugging_face(architecture, **settings).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return Path(path)


@cache
def shared_folder(architecture: str = "llama-gqa") -> Path:
    """The folder of an unaltered tiny model, made once for all tests and deleted at the end."""
    path = Path(tempfile.mkdtemp(prefix="lenskit-")) / f"tiny-{architecture}"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return tiny_folder(path, architecture)


@cache
def shared_model(architecture: str = "llama-gqa"):
    """A tiny model loaded once for all tests, which must leave it as it was."""
    return load_model(shared_folder(architecture), device="cpu", check="hooks")


def reference_model(path: str | Path, dtype: torch.dtype = torch.float32):
    """Hugging Face's own model from the same folder, with eager attention."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    return loaded.eval()
