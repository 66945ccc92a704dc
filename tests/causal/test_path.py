"""The edges of a decision path, each against a plain hook that cuts it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from steered import hook_count

import lenskit as lk
from lenskit.causal import Mean, decision_path
from lenskit.models import applied_edits, chat_ids

QUESTION = "Answer in one word. What is the scariest thing in the world?"


@pytest.fixture(scope="module")
def ids(model):
    return chat_ids(model, [[{"role": "user", "content": QUESTION}]]).input_ids


@pytest.fixture(scope="module")
def spans(model):
    return [lk.span(model, QUESTION, text) for text in ("one word", "scariest thing")]


@pytest.fixture(scope="module")
def path(model, spans):
    before = hook_count(model)
    found = decision_path(model, QUESTION, spans)
    assert hook_count(model) == before and not applied_edits(model)
    return found


@torch.no_grad()
def measured(model, ids, hooks=(), token=None):
    """Log-probabilities of the next token under plain hooks; of one token where it is given."""
    with model.hooks(fwd_hooks=list(hooks)):
        chances = model(ids, use_cache=False)[0, -1].log_softmax(-1)
    return chances if token is None else float(chances[token])


def cutting(span, heads, queries):
    """A hook that takes the attention of some queries to a span away, and normalises again."""

    def cut(pattern, hook):
        pattern = pattern.clone()
        for head in heads:
            rows = pattern[0, head]
            rows[torch.tensor(queries)[:, None], torch.tensor(span.positions)] = 0.0
            rows[queries] = rows[queries] / rows[queries].sum(-1, keepdim=True)
        return pattern

    return cut


def test_every_edge_into_a_head_is_what_a_plain_hook_on_the_pattern_gives(model, ids, spans, path):
    token = int(measured(model, ids).argmax())
    assert path.answer == model.tokenizer.decode([token])
    assert path.plain == pytest.approx(measured(model, ids, token=token), abs=1e-5)
    last, every = [ids.shape[1] - 1], range(4)
    for i, span in enumerate(spans):
        later = list(range(span.positions[-1] + 1, ids.shape[1]))

        def effect(blocks, heads, queries, span=span):
            cut = cutting(span, heads, queries)
            hooks = [(f"blocks.{block}.attn.hook_pattern", cut) for block in blocks]
            return measured(model, ids, hooks, token) - path.plain

        for block in range(3):
            for head in every:
                expected = effect([block], [head], last)
                assert float(path.to_heads[i, block, head]) == pytest.approx(expected, abs=1e-4)
            assert float(path.to_blocks[i, block]) == pytest.approx(
                effect([block], every, last), abs=1e-4
            )
        assert float(path.to_last[i]) == pytest.approx(effect(range(3), every, last), abs=1e-4)
        assert float(path.to_later[i]) == pytest.approx(effect(range(3), every, later), abs=1e-4)


def test_every_edge_to_the_answer_is_what_replacing_an_output_by_its_mean_gives(model, ids, path):
    token = int(measured(model, ids).argmax())

    def mean_at(index):
        def replace(value, hook):
            value = value.clone()
            value[(0, -1, *index)] = value[(0, slice(1, None), *index)].mean(0)
            return value

        return replace

    for block in range(3):
        for head in range(4):
            hooks = [(f"blocks.{block}.attn.hook_z", mean_at((head,)))]
            expected = measured(model, ids, hooks, token) - path.plain
            assert float(path.from_heads[block, head]) == pytest.approx(expected, abs=1e-4)
        hooks = [(f"blocks.{block}.hook_mlp_out", mean_at(()))]
        expected = measured(model, ids, hooks, token) - path.plain
        assert float(path.from_mlps[block]) == pytest.approx(expected, abs=1e-4)


def test_some_blocks_another_target_and_another_source_are_parts_of_the_same(
    model, ids, spans, path
):
    some = decision_path(model, QUESTION, spans[1], blocks=[2, 0], batch_size=5)
    assert some.blocks == (2, 0) and some.spans == path.spans[1:]
    torch.testing.assert_close(some.to_heads, path.to_heads[1:, [2, 0]])
    torch.testing.assert_close(some.from_heads, path.from_heads[[2, 0]])
    torch.testing.assert_close(some.to_last, path.to_last[1:])
    same = decision_path(model, ids[0].tolist(), spans[1], blocks=[0], source=Mean([QUESTION]))
    torch.testing.assert_close(same.from_mlps, path.from_mlps[:1])
    ranked = measured(model, ids).argsort(descending=True)[:2].tolist()
    other = decision_path(model, QUESTION, spans, target=ranked[1:] + [9], blocks=[0])
    assert other.answer == model.tokenizer.decode(ranked[1:])
    assert other.plain == pytest.approx(float(measured(model, ids)[ranked[1]]), abs=1e-5)
    between = decision_path(model, QUESTION, spans, against=[ranked[1]], blocks=[0])
    chances = measured(model, ids)
    difference = float(chances[ranked[0]] - chances[ranked[1]])
    assert between.plain == pytest.approx(difference, abs=1e-4)
    assert between.measure.startswith("logit of") and " - logit of" in between.measure


def test_the_strongest_edges_come_first_and_only_they_are_drawn(path):
    reads = path.reads(4)
    sizes = [abs(effect) for effect in reads.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == path.to_heads.abs().flatten().sort(descending=True).values[:4].tolist()
    for (span, block, head), effect in reads.items():
        assert effect == float(path.to_heads[span, block, head])
    assert path.writes([(2, 1)]) == {(2, 1): float(path.from_heads[2, 1])}
    assert len(path.reads(999)) <= path.to_heads.numel() and path.mlps(0) == {}
    figure = path.figure(reads=4, mlps=2)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {f"{block}.{head}" for _, block, head in reads} <= texts
    assert {f"MLP {block}" for block in path.mlps(2)} <= texts
    assert len([text for text in texts if "." in text and text[0].isdigit()]) == len(
        {key[1:] for key in reads}
    )
    shown = repr(path)
    assert len(shown.splitlines()) <= 15 and "for the last token" in shown and "head" in shown


def test_what_cannot_be_a_path_is_refused(model, ids, spans):
    run = partial(decision_path, model, QUESTION)
    end = ids.shape[1] - 1
    with pytest.raises(ValueError, match="must end before the prompt's last token"):
        run([[end - 1, end]])
    with pytest.raises(ValueError, match="positions is empty"):
        run([])
    with pytest.raises(ValueError, match="blocks must be different numbers"):
        run(spans, blocks=[3])
    with pytest.raises(ValueError, match="of another prompt"):
        decision_path(model, "Why?", spans)
    with pytest.raises(ValueError, match="begin alike"):
        token = int(measured(model, ids).argmax())
        run(spans, target=[token, 7], against=[token, 8])
