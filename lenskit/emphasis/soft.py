"""A soft prompt: learnt embeddings that stand where placeholder tokens stand in a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed
from lenskit.models import using
from lenskit.tasks import TaskPrompt

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_PLACEHOLDERS = "~^|`§¦¬¤@#=+"


@dataclass(frozen=True, repr=False, eq=False)
class SoftPrompt(Displayed):
    """``embeddings`` in the place of as many tokens ``token``, which ``text`` consists of."""

    embeddings: Float[Tensor, "token d_model"]
    token: int
    text: str

    @classmethod
    def of(cls, model: TransformerBridge, embeddings: Float[Tensor, "token d_model"]) -> SoftPrompt:
        """One whose placeholder the tokenizer leaves whole; raises ValueError where none is."""
        number = len(embeddings)
        for letter in _PLACEHOLDERS:
            text = letter * number
            ids = model.tokenizer(f"Say\n{text}\nSay", add_special_tokens=False)["input_ids"]
            alone = model.tokenizer(letter, add_special_tokens=False)["input_ids"]
            if len(alone) == 1 and ids.count(alone[0]) == number:
                return cls(embeddings, alone[0], text)
        raise ValueError(f"the tokenizer joins all of {_PLACEHOLDERS!r}; no placeholder is left")

    @contextmanager
    def inside(self, model: TransformerBridge) -> Iterator[None]:
        """Rows that hold all placeholders have the embeddings in their place.

        Raises ValueError at the end where no row had them.
        """
        number, met = len(self.embeddings), False

        def put(module: Any, args: tuple, out: Tensor) -> Tensor:
            nonlocal met
            mask = args[0] == self.token
            whole = mask.sum(dim=1, keepdim=True) == number
            if not bool(whole.any()):
                return out
            met = True
            at = (mask.cumsum(dim=1) - 1).clamp(min=0)
            own = self.embeddings.to(out)[at.clamp(max=number - 1)]
            return torch.where((mask & whole)[..., None], own, out)

        with using(model) as note:
            handle = model.original_model.get_input_embeddings().register_forward_hook(put)
            note(handle.remove)
            yield
        if not met:
            raise ValueError(f"no prompt held the placeholders {self.text!r}; see `inserted`")


def inserted(prompt: TaskPrompt, text: str) -> TaskPrompt:
    """The prompt with ``text`` as a line of its own before the first message of the user."""
    messages = list(prompt.messages)
    place = next(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[place] = {**messages[place], "content": f"{text}\n{messages[place]['content']}"}
    return replace(prompt, messages=tuple(messages))
