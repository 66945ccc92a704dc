from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lenskit.embedded.batches import Batch
from lenskit.embedded.masks import CLOSING, Narrowing, Sight, closing_tokens, sight_mask
from lenskit.embedded.objective import objective, price_at

HEADER = 2


def tiny(seed: int = 0, kv_heads: int = 2) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=True,
            attn_implementation="eager",
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(config).double()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model


def batch(sights: list[Sight | None] | None = None) -> Batch:
    """Three rows of 18, 16 and 13 tokens with one closing each at another place, then an answer."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 40, (3, 18), generator=generator)
    ids[:, 0] = 1
    target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (header, end) in enumerate(((9, 18), (6, 16), (5, 13))):
        ids[row, header - 4], ids[row, header - 1], ids[row, header] = HEADER, 4, HEADER
        ids[row, end:] = 0
        target[row, header + 4 : end] = True
    closing = closing_tokens(ids, HEADER)
    assert closing[:, 0].tolist() == [8, 5, 4] and closing.shape == (3, CLOSING)
    mask = sight_mask(closing, ids.shape[1], sights or [None] * 3)
    return Batch(ids, target, closing, mask)


def plainly(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and price by transformers' own eager attention, whose patterns are all there."""
    rows, width = batch.ids.shape
    mask = batch.mask
    if mask is None:
        mask = torch.ones(width, width, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    out = model(batch.ids, attention_mask=mask, output_attentions=True)
    labels = batch.ids.masked_fill(~batch.target, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
    )
    price = 0.0
    for row, places in enumerate(batch.closing.tolist()):
        elsewhere = [
            1 - pattern[row, :, place, 0] - pattern[row, :, place, place]
            for pattern in out.attentions
            for place in places
        ]
        price = price + torch.stack(elsewhere).mean()
    return loss, price


SIGHTS = [Sight(CLOSING - 1, (True, False, True, False, False)), None, Sight()]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("sights", [None, SIGHTS])
@pytest.mark.parametrize("which", [0, 1])
def test_loss_and_price_and_their_gradients_are_those_of_plain_eager_attention(
    which, sights, kv_heads
):
    model, one = tiny(kv_heads=kv_heads), batch(sights)
    found, expected = objective(model, one)[which], plainly(model, one)[which]
    # transformers takes norms and softmax in float32; the loss is a sum over thirty tokens.
    tolerance = (5e-6, 1e-6)[which]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    # What lies behind the last pattern bears nothing of the price.
    parameters = list(model.parameters())
    ours = torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))
    assert sum(float(g.abs().sum()) for g in theirs) > 0


@torch.no_grad()
def test_the_price_lies_between_none_and_all_and_is_left_out_where_nobody_pays():
    model, one = tiny(), batch()
    loss, price = objective(model, one)
    assert 0 < float(price) < len(one.ids)
    unpriced, nothing = objective(model, one, priced=False)
    assert float(nothing) == 0 and float(unpriced) == float(loss)


def test_the_price_rises_over_its_ramp():
    prices = [price_at(step, 1300, 0.1, (250 / 1300, 0.5)) for step in range(1300)]
    assert prices[:251] == [0.0] * 251
    assert prices[450] == pytest.approx(0.05)
    assert prices[650:] == [0.1] * 650
    assert prices == sorted(prices)
    assert {price_at(step, 10, 0.1, (0.0, 0.0)) for step in range(1, 10)} == {0.1}


def test_a_narrow_answer_sees_the_closing_tokens_and_itself_but_not_the_prompts_text():
    one = batch([Sight(), None, Sight()])
    for row in range(3):
        first = int(one.closing[row, 0])
        for query in range(one.ids.shape[1]):
            seen = set(one.mask[row, 0, query].nonzero().flatten().tolist())
            if row == 1 or query < first + CLOSING:
                assert seen == set(range(query + 1))
            else:
                assert seen == {0, *range(first, query + 1)}


def test_with_tokens_hidden_the_last_closing_token_and_the_answer_see_only_what_is_left():
    kept = (False, True, False, True)
    one = batch([Sight(CLOSING - 1, (*kept, True)), Sight(CLOSING - 1, (*kept, False)), None])
    for row, last_seen in ((0, True), (1, False)):
        first = int(one.closing[row, 0])
        last = first + CLOSING - 1
        others = {first + i for i, is_kept in enumerate(kept) if is_kept}
        for query in range(one.ids.shape[1]):
            seen = set(one.mask[row, 0, query].nonzero().flatten().tolist())
            if query < last:
                assert seen == set(range(query + 1))
            elif query == last:
                assert seen == {0, *others, last}
            else:
                held = {last} if last_seen else set()
                assert seen == {0, *others, *held, *range(last + 1, query + 1)}


def test_no_mask_is_made_where_every_row_sees_everything():
    assert batch([None, None, None]).mask is None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_a_narrow_answer_always_sees_some_closing_token_before_the_last(seed):
    sight = Narrowing(narrow=1.0, hidden=1.0).draw(Random(seed))
    assert sight.begins == CLOSING - 1 and any(sight.closing[:-1])
    assert Narrowing(narrow=1.0, hidden=0.0).draw(Random(seed)) == Sight()
    assert Narrowing(narrow=0.0).draw(Random(seed)) is None


def test_dialogues_are_narrowed_in_the_shares_asked_for():
    random, number = Random(0), 20_000
    drawn = [Narrowing(0.5, 0.6, 0.4).draw(random) for _ in range(number)]
    narrow = [sight for sight in drawn if sight is not None]
    hidden = [sight for sight in narrow if sight.begins < CLOSING]
    forgotten = [sight for sight in hidden if not sight.closing[-1]]
    assert len(narrow) / number == pytest.approx(0.5, abs=0.02)
    assert len(hidden) / len(narrow) == pytest.approx(0.6, abs=0.02)
    assert len(forgotten) / len(hidden) == pytest.approx(0.4, abs=0.03)
    seen = {sight.closing[:-1] for sight in hidden}
    assert len(seen) == 15
