"""The settings of a training run, whose defaults are the recipe of the embedded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lenskit.embedded.corpus import FIRST_MIXTURE, MIXTURE
from lenskit.embedded.dialogue import Task
from lenskit.embedded.grammar import Grammar
from lenskit.embedded.masks import Narrowing
from lenskit.embedded.objective import RAMP


@dataclass(frozen=True)
class Size:
    """Blocks, residual stream, query heads over key-value heads, and tokens of the vocabulary."""

    blocks: int = 8
    d_model: int = 192
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 6144

    @property
    def d_mlp(self) -> int:
        """Seven thirds of d_model, to the nearest multiple of 64."""
        return 64 * round(self.d_model * 7 / 3 / 64)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's result depends on; ``training.json`` and the state file keep it.

    The first ``first`` of the steps (a share) draw from ``FIRST_MIXTURE``, the others from
    ``MIXTURE``. ``narrow_from`` and ``hidden_from``: the shares of the steps from which on
    dialogues may be narrow, and closing tokens hidden in them. Not at once, since which of 512
    concepts it is, is learnt from prompts that the answer sees; and well before the price, which
    makes answers read the prefix themselves unless the closing tokens already carry it.
    ``concepts``: how many concepts, evenly over the classes; 0 for all. ``ramp``: between which
    shares of the steps the price rises to ``price``.
    ``without``: names of tasks that are left out of both mixtures.
    """

    steps: int = 6400
    batch: int = 64
    learning_rate: float = 6e-3
    seed: int = 0
    first: float = 0.5
    narrow_from: float = 0.28
    hidden_from: float = 0.5
    price: float = 0.1
    ramp: tuple[float, float] = RAMP
    narrowing: Narrowing = Narrowing()
    size: Size = Size()
    concepts: int = 0
    without: tuple[str, ...] = ()


def mixture_at(recipe: Recipe, step: int) -> Mapping[Task, float]:
    """The tasks that a step draws from and their shares.

    Raises ValueError for a name in ``recipe.without`` that is no task.
    """
    names = {task.__name__ for mixture in (FIRST_MIXTURE, MIXTURE) for task in mixture}
    if unknown := sorted(set(recipe.without) - names):
        raise ValueError(f"without={unknown} are no tasks; there are {', '.join(sorted(names))}")
    mixture = FIRST_MIXTURE if step < recipe.first * recipe.steps else MIXTURE
    return {task: s for task, s in mixture.items() if task.__name__ not in recipe.without}


def new_model(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of that size; its vocabulary is the tokenizer's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def with_concepts(grammar: Grammar, number: int) -> Grammar:
    """The grammar with ``number`` of its concepts, evenly over the classes; 0 keeps them all.

    Within a class they are spread evenly over the file. Raises ValueError unless ``number`` is a
    multiple of the number of classes that every class can give.
    """
    if not number:
        return grammar
    each, rest = divmod(number, len(grammar.classes))
    fewest = min(len(rules.entries) for rules in grammar.classes.values())
    if number < 0 or rest or each > fewest:
        raise ValueError(
            f"concepts={number} does not spread evenly over {len(grammar.classes)} classes of at "
            f"least {fewest}; give a multiple of {len(grammar.classes)} up to "
            f"{fewest * len(grammar.classes)}, or 0 for all"
        )
    classes = {}
    for name, rules in grammar.classes.items():
        entries = list(rules.entries.items())
        chosen = dict(entries[i * len(entries) // each] for i in range(each))
        classes[name] = replace(rules, entries=MappingProxyType(chosen))
    return replace(grammar, classes=MappingProxyType(classes))
