"""Opening a model and running it: tokens, templates, checks at load, fused attention, batches."""

from __future__ import annotations

from lenskit.models.active import (
    Chunk,
    Edit,
    applied,
    applied_edits,
    chunk_of,
    paused,
    require_rows,
    rows_of,
    unwatched,
)
from lenskit.models.batches import Arrivals, in_batches
from lenskit.models.check import PATTERN, RESID, SCORES, ModelReport, check_model, model_report
from lenskit.models.closing import ClosingTokens
from lenskit.models.contents import locate
from lenskit.models.edited import Scores
from lenskit.models.fused import shares
from lenskit.models.generating import fused_generation
from lenskit.models.hugging_face import EMBEDDED, load_hugging_face, model_location
from lenskit.models.keys import HeadHooks, head_hooks
from lenskit.models.kv_cache import cache_of
from lenskit.models.loading import load_model, model_fingerprint, same_model
from lenskit.models.next_tokens import next_logits
from lenskit.models.padding import Limits, limits_of
from lenskit.models.positions import require_positions
from lenskit.models.reference import (
    EVERYTHING,
    ModelCheckError,
    attention_patterns,
    decoder_layers,
    run_plain,
    use_eager_attention,
)
from lenskit.models.spans import encode_with_offsets, tokens_of
from lenskit.models.starts import tokens_run
from lenskit.models.templates import (
    PLAIN_TEMPLATE,
    Conversation,
    Tokens,
    chat_ids,
    conversation_ids,
    load_tokenizer,
    pad_left,
    position_ids,
    refuse_special,
    render,
    special_tokens,
)
from lenskit.models.use import hooked, using

__all__ = [
    "EMBEDDED",
    "EVERYTHING",
    "PATTERN",
    "PLAIN_TEMPLATE",
    "RESID",
    "SCORES",
    "Arrivals",
    "Chunk",
    "ClosingTokens",
    "Conversation",
    "Edit",
    "HeadHooks",
    "Limits",
    "ModelCheckError",
    "ModelReport",
    "Scores",
    "Tokens",
    "applied",
    "applied_edits",
    "attention_patterns",
    "cache_of",
    "chat_ids",
    "check_model",
    "chunk_of",
    "conversation_ids",
    "decoder_layers",
    "encode_with_offsets",
    "fused_generation",
    "head_hooks",
    "hooked",
    "in_batches",
    "limits_of",
    "load_hugging_face",
    "load_model",
    "load_tokenizer",
    "locate",
    "model_fingerprint",
    "model_location",
    "model_report",
    "next_logits",
    "pad_left",
    "paused",
    "position_ids",
    "refuse_special",
    "render",
    "require_positions",
    "require_rows",
    "rows_of",
    "run_plain",
    "same_model",
    "shares",
    "special_tokens",
    "tokens_of",
    "tokens_run",
    "unwatched",
    "use_eager_attention",
    "using",
]


def __dir__() -> list[str]:
    return __all__
