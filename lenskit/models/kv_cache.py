"""Keys and values of earlier passes, whatever transformers calls them.

From 5.24 on its models hand them to their parts as ``cache``; the bridge's attention, which knows
the earlier name, would leave the cache empty, and a cached step would see itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_EARLIER, _LATER = "past_key_values", "cache"


def cache_of(options: Mapping[str, Any]) -> Any:
    """The cache among a forward pass's keyword arguments, or ``None``."""
    found = options.get(_EARLIER)
    return options.get(_LATER) if found is None else found


def hand_on_cache(model: TransformerBridge) -> None:
    """From now on call the cache by the name that the bridge's attention looks for."""

    def rename(module: Any, given: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if options.get(_LATER) is not None and options.get(_EARLIER) is None:
            options = {**options, _EARLIER: options[_LATER]}
            del options[_LATER]
        return given, options

    for block in model.blocks:
        # Blocks of other kinds than attention have none.
        if (attention := getattr(block, "attn", None)) is not None:
            attention.register_forward_pre_hook(rename, with_kwargs=True)
