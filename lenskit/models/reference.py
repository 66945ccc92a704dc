"""Hugging Face's own model, read without any bridge: what a bridge's hooks must agree with.

A bridge rewires the model that it wraps, so everything here is read before, from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids
from transformers import PreTrainedConfig

from lenskit.models.templates import Tokens, conversation_ids, pad_left, position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Two lengths, so that the shorter one is padded.
_PROBES = ("Hello!", "What do you think about rain in the morning?")
EVERYTHING = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}


class ModelCheckError(RuntimeError):
    """A model whose hooks do not return, or do not change, what their names say."""


def probe_tokens(tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """Two short prompts of different lengths, the shorter left padded; without text, low ids."""
    if tokenizer is None:
        # An alphabet may have no more than a few letters.
        return pad_left([[1, 2, 3, 4], [1, 3, 2, 4, 4, 2, 1, 1, 3, 4, 2]], 0)
    return conversation_ids(tokenizer, [[{"role": "user", "content": text}] for text in _PROBES])


@dataclass(frozen=True)
class Reference:
    """Hugging Face's own patterns and hidden states on the probe prompts, read without hooks."""

    patterns: tuple[Float[Tensor, "prompt head pos key"], ...]
    hidden_states: tuple[Float[Tensor, "prompt pos d_model"], ...]

    @classmethod
    def read(cls, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Reference:
        """Run ``hf_model`` (eager attention; before any bridge has wrapped it) on the probes.

        Raises ``ModelCheckError`` for a model that has no attention, or not in every block.
        """
        output = run_plain(hf_model, probe_tokens(tokenizer), **EVERYTHING)
        return cls(
            tuple(pattern.float().cpu() for pattern in attention_patterns(hf_model, output)),
            tuple(state.float().cpu() for state in output.hidden_states),
        )


def use_eager_attention(hf_model: PreTrainedModel) -> None:
    """Let the model compute its attention patterns, and so return them.

    Falcon, made in memory with fused attention, keeps it whatever its own switch is told, and
    then returns patterns that are not causal.
    """
    hf_model.set_attn_implementation("eager")
    for module in hf_model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation_internal = "eager"


def decoder_layers(hf_model: PreTrainedModel) -> nn.ModuleList:
    """The list of a Hugging Face model's blocks."""
    number = _number_of_blocks(hf_model)
    for module in hf_model.modules():
        # A list of experts may be as long, but lies further in.
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ModelCheckError(f"{type(hf_model).__name__} has no list of {number} blocks")


def attention_patterns(hf_model: PreTrainedModel, output: Any) -> tuple[Tensor, ...]:
    """The attention patterns of every block; raises where they are not all there."""
    patterns = getattr(output, "attentions", None) or ()
    returned = sum(pattern is not None for pattern in patterns)
    blocks = _number_of_blocks(hf_model)
    if returned < blocks:
        raise ModelCheckError(
            f"{type(hf_model).__name__} returns attention patterns for {returned} of its {blocks} "
            "blocks. Recurrent and linear-attention blocks have none, and such models cannot be "
            "used; any other must be loaded with attn_implementation='eager' and must not be "
            "wrapped in a bridge before"
        )
    return patterns


def _number_of_blocks(hf_model: PreTrainedModel) -> int:
    return int(hf_model.config.get_text_config().num_hidden_layers)


@torch.no_grad()
def run_plain(hf_model: PreTrainedModel, tokens: Tokens, **options: Any) -> Any:
    """Hugging Face's output for padded tokens, with positions that count real tokens alone."""
    tokens = tokens.to(hf_model.get_input_embeddings().weight.device)
    if accepts_mask_derived_position_ids(hf_model):
        options["position_ids"] = position_ids(tokens.attention_mask)
    return hf_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **options)
