"""How many positions a model was made for, and the refusal of prompts that are longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.models.templates import Tokens

# Their config may name the positions before scaling; those of the others are scaled already.
_SCALED = ("linear", "dynamic", "yarn", "ntk")


def positions(model: TransformerBridge) -> int | None:
    """The most tokens that the model was made for, or None where its config names no limit.

    That of the config (``max_position_embeddings``, ``n_positions``, ``max_seq_len``). Where
    rotary positions are scaled by a factor, and it is not plain whether the config's number counts
    that in, the larger one. ALiBi has no limit.
    """
    hf_model = getattr(model, "original_model", None)
    if hf_model is None:
        return None
    config = hf_model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "n_ctx")
    found = [getattr(config, name, None) for name in names]
    most = next((int(value) for value in found if value), None)
    if most is None or getattr(config, "alibi", False):
        return None
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all blocks, or one for each kind of block.
    kinds: list[Any] = [given, *(each for each in given.values() if isinstance(each, dict))]
    scaled = [
        int((kind.get("original_max_position_embeddings") or most) * float(kind["factor"]))
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) in _SCALED and kind.get("factor")
    ]
    return max([most, *scaled])


def require_positions(model: TransformerBridge, tokens: Tokens, more: int = 0) -> None:
    """Raise ``ValueError`` where a prompt, with ``more`` tokens behind it, is too long.

    Beyond its positions a model has no embedding for them or has never seen them, so that what it
    computes means nothing, even where it runs.
    """
    most = positions(model)
    longest = int(tokens.lengths.max()) if len(tokens) else 0
    if most is not None and longest + more > most:
        answer = f" and {more} new ones" if more else ""
        what = "prompt, or ask for fewer new tokens" if more else "prompt"
        number = int((tokens.lengths + more > most).sum())
        raise ValueError(
            f"{number} of {len(tokens)} prompts are too long: the longest has {longest} "
            f"tokens{answer}, but this model has {most} positions (max_position_embeddings of its "
            f"config); shorten the {what}"
        )
