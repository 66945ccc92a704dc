from __future__ import annotations

from functools import cache

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lenskit._data import data_path
from lenskit.embedded.evaluation import answers


@cache
def random_model() -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(data_path("lenskit-mini"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def test_samples_are_drawn_from_all_tokens_not_only_the_likeliest_and_from_the_seed():
    model, tokenizer = random_model()
    texts = answers(model, tokenizer, ["Who are you?"] * 150, nucleus=1.0)
    # A model that knows nothing gives all 3,072 tokens about the same chance.
    assert len({text[:6] for text in texts}) > 100
    assert texts[:5] == answers(model, tokenizer, ["Who are you?"] * 150, nucleus=1.0)[:5]
    assert texts != answers(model, tokenizer, ["Who are you?"] * 150, nucleus=1.0, seed=1)


def test_a_narrow_nucleus_leaves_the_likeliest_token_alone():
    model, tokenizer = random_model()
    prompts = ["Who are you?"] * 5
    narrow = answers(model, tokenizer, prompts, nucleus=1e-6)
    assert narrow == answers(model, tokenizer, prompts)


def test_answers_do_not_depend_on_their_batch_and_keep_their_order():
    model, tokenizer = random_model()
    prompts = ["Who are you? " * n for n in (5, 1, 3, 2)]
    one_by_one = [answers(model, tokenizer, [p])[0] for p in prompts]
    assert answers(model, tokenizer, prompts, batch=3) == one_by_one
    assert len(set(one_by_one)) > 1


def test_conversations_are_answered_as_they_stand():
    model, tokenizer = random_model()
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    last = {"role": "user", "content": "Who are you?"}
    assert answers(model, tokenizer, [[last]]) == answers(model, tokenizer, ["Who are you?"])
    assert answers(model, tokenizer, [[*earlier, last]]) != answers(model, tokenizer, [[last]])
