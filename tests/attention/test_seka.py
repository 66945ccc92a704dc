"""Edits of keys: SEKA and AdaSEKA against plain PyTorch on Hugging Face's own model."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, partial

import pytest
import tiny
import torch
from steered import decoder_layers, hook_count, random_vectors

import lenskit as lk
from lenskit.attention import KeyPolicy
from lenskit.models import (
    ModelCheckError,
    chat_ids,
    generating,
    head_hooks,
    model_fingerprint,
)

pytestmark = pytest.mark.usefixtures("nothing_left_on")

INSTRUCTION = "Answer in one word."
QUESTIONS = [
    f"{INSTRUCTION} What is the scariest thing in the world?",
    f"Rain? {INSTRUCTION}",
    f"Libraries should stay open on Sundays. {INSTRUCTION} Why?",
]
# One of each form in which keys come by: apart, normed in three layouts, joint with the queries.
FORMS = ["llama-gqa", "qwen3", "gemma3", "olmo2", "gpt2", "gpt_neox"]
OTHERS = [
    name
    for name in (*tiny.ARCHITECTURES, "gpt_oss", "cohere2", "phi", "falcon", "smollm3", "gpt_neo")
    if name not in FORMS
]
ALL = [*FORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
JOINT = {"gpt2", "gpt_neox", "phi3", "bloom", "falcon"}


def user(text):
    return [{"role": "user", "content": text}]


def spans_of(model, questions=QUESTIONS):
    return [lk.span(model, question, INSTRUCTION) for question in questions]


@cache
def projections_of(model, seed=0):
    """Random orthonormal directions of no meaning, with masses that fall."""
    hooks = head_hooks(model)
    size = (model.cfg.n_layers, hooks.kv_heads, hooks.d_head)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, *size, hooks.d_head, generator=generator)
    vectors = torch.linalg.qr(drawn).Q
    mass = torch.rand(2, *size, generator=generator).sort(dim=-1, descending=True).values ** 3
    return lk.KeyProjections(
        *vectors,
        *mass,
        shift=torch.rand(size[:2], generator=generator),
        mass=0.9,
        group=hooks.heads // hooks.kv_heads,
        tokens=100,
        model=model_fingerprint(model),
        data_hash="",
        version="",
    )


def read(model, tokens, kinds):
    """What hooks of every block hold, and the logits; from plain hooks."""
    seen = {}

    def keep(value, hook):
        seen[hook.name] = value.float().clone()

    names = [f"blocks.{block}.{kind}" for block in range(model.cfg.n_layers) for kind in kinds]
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return seen, logits[:, -1].float()


def logits_of(model, tokens):
    return read(model, tokens, [])[1]


def keys_of(model, tokens):
    """Keys ``[row, block, pos, kv_head, d_head]`` before the rotation."""
    hooks, seen = head_hooks(model), {}

    def keep(value, hook):
        seen[hook.name] = hooks.split(model, hook.name, value).clone()

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in hooks.keys]):
        model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return torch.stack([seen[name] for name in hooks.keys], dim=1)


def key_mask(tokens, spans):
    """Which keys of the padded batch the spans hold, found without the library's positions."""
    mask = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for row, span in enumerate(spans):
        padding = mask.shape[1] - span.length
        mask[row, [padding + position for position in span.positions]] = True
    return mask


@pytest.mark.parametrize("architecture", ALL)
def test_the_keys_of_the_span_are_those_of_the_equation_and_no_others_change(architecture):
    model = tiny.shared_model(architecture)
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    projections = projections_of(model)
    last, own = model.cfg.n_layers - 1, projections.shift.shape[1] - 1
    heads = lk.Heads({last: [own * projections.group]})
    clean = keys_of(model, tokens)
    with lk.attend(model, spans, lk.Seka(projections, 0.7, 0.3), heads=heads):
        found = keys_of(model, tokens)
    inside = key_mask(tokens, spans)
    positive, negative = projections.positive[last, own], projections.negative[last, own]
    expected = clean.clone()
    k = clean[:, last, :, own][inside]
    expected[:, last, :, own][inside] = k + (0.7 * k @ positive + 0.3 * k @ negative) / 2
    assert (found - expected).abs().max() < 1e-5 * clean.abs().max()
    expected[:, last, :, own][inside] = found[:, last, :, own][inside]
    assert torch.equal(found, expected)
    assert torch.equal(keys_of(model, tokens), clean)


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "qwen3", "gpt2", "gemma2"])
def test_scores_change_only_for_keys_of_the_span_in_the_group_of_the_chosen_head(architecture):
    model = tiny.shared_model(architecture)
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    projections = projections_of(model)
    group = [h for h in range(4) if h // projections.group == 2 // projections.group]
    clean, _ = read(model, tokens, ["attn.hook_attn_scores"])
    with lk.attend(model, spans, lk.Seka(projections), heads=lk.Heads({0: [2]})):
        found, logits = read(model, tokens, ["attn.hook_attn_scores"])
    name = "blocks.0.attn.hook_attn_scores"
    changed = found[name] != clean[name]
    allowed = torch.zeros_like(changed)
    allowed[:, group] = key_mask(tokens, spans)[:, None, None]
    assert not (changed & ~allowed).any()
    seen = allowed & torch.ones(changed.shape[-2:]).tril().bool()
    seen &= tokens.attention_mask.bool()[:, None, :, None]
    assert changed[seen].float().mean() > 0.99
    assert (logits - logits_of(model, tokens)).abs().max() > 0


def rotated(x, at, theta=10000.0):
    """The rotation of Llama at one position."""
    half = x.shape[-1] // 2
    angle = at * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    one, other = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def test_a_score_changes_by_the_rotated_product_of_query_and_projected_key(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    projections = projections_of(model)
    scores = "blocks.0.attn.hook_attn_scores"
    clean, _ = read(model, tokens, ["attn.hook_attn_scores", "attn.q.hook_out", "attn.k.hook_out"])
    with lk.attend(model, span, lk.Seka(projections, 0.8), heads=lk.Heads({0: [3]})):
        found, _ = read(model, tokens, ["attn.hook_attn_scores"])
    key, query, head = span.positions[1], span.length - 1, 3
    q = clean["blocks.0.attn.q.hook_out"][0, query, head].double()
    k = clean["blocks.0.attn.k.hook_out"][0, key, head // 2].double()
    change = 0.8 * projections.positive[0, head // 2].double() @ k / 2
    expected = rotated(q, query) @ rotated(change, key) / 8**0.5
    difference = found[scores][0, head, query, key] - clean[scores][0, head, query, key]
    assert abs(float(expected - difference)) < 1e-5 * clean[scores][0, head, query, 0].abs()


def test_no_gain_is_bit_identical_and_sets_no_hook(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    clean, before, plain = logits_of(model, tokens), hook_count(model), answers(model)
    seka = lk.Seka(projections_of(model), 0.0)
    with lk.attend(model, spans, seka, heads=lk.Heads.all(model)):
        assert torch.equal(logits_of(model, tokens), clean)
        assert hook_count(model) == before + 1  # what looks at the tokens
        assert answers(model) == plain


def answers(model, questions=QUESTIONS):
    return lk.generate(model, questions, max_new_tokens=6)


@contextmanager
def by_hand(hf_model, projections, gain, span):
    """Keys of unpadded prompts edited by PyTorch's own hooks on Hugging Face's projection."""

    def edit(block):
        def hook(module, args, output):
            keys = output.unflatten(-1, projections.shift.shape[1:] + (-1,)).clone()
            at = list(span.positions)
            change = torch.einsum("phd,hde->phe", keys[0, at], projections.positive[block])
            keys[0, at] += gain * change / 2
            return keys.flatten(-2)

        return hook

    layers = decoder_layers(hf_model)
    handles = [
        layer.self_attn.k_proj.register_forward_hook(edit(block))
        for block, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_generation_is_that_of_hugging_faces_own_model_with_its_keys_edited_by_hand(model):
    hf_model = tiny.reference_model(tiny.shared_folder())
    projections = projections_of(model)
    for question, span in zip(QUESTIONS, spans_of(model), strict=True):
        ids = list(span.ids)
        with by_hand(hf_model, projections, 3.0, span), torch.no_grad():
            for _ in range(6):
                logits = hf_model(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        with lk.attend(model, span, lk.Seka(projections, 3.0), heads=lk.Heads.all(model)):
            found = lk.generate(model, question, max_new_tokens=6)
        assert list(found.token_ids) == ids[span.length :][: len(found.token_ids)]


@pytest.mark.parametrize("architecture", ALL)
def test_cached_generation_equals_uncached_passes_fused_or_not(architecture):
    model = tiny.shared_model(architecture)
    spans, heads = spans_of(model), lk.Heads.all(model)
    seka = lk.Seka(projections_of(model), 4.0)

    def eager():
        return model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: None)])

    with lk.attend(model, spans, seka, heads=heads):
        quick = answers(model)
        # Whether GPT-J's attention can be replaced depends on the version of transformers.
        if architecture not in ("opt", "gptj"):
            assert bool(generating.obstacle(model)) == (architecture in (*JOINT, "gpt_neo"))
        with eager():
            assert answers(model) == quick
    assert quick != answers(model)
    with lk.attend(model, spans[0], seka, heads=heads):
        assert answers(model, QUESTIONS[:1]) == quick[:1]
    ids = torch.tensor([spans[0].ids])
    for token in quick[0].token_ids:
        with lk.attend(model, spans[0], seka, heads=heads), torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert int(ids[0, -1]) == token


@pytest.mark.parametrize("architecture", FORMS)
def test_fused_generation_gives_the_logits_of_eager_attention(architecture):
    model = tiny.shared_model(architecture)
    tokens = chat_ids(model, [user(q) for q in QUESTIONS])
    with lk.attend(
        model, spans_of(model), lk.Seka(projections_of(model)), heads=lk.Heads.all(model)
    ):
        slow = generating._steps(model, tokens)
        with generating.fused_generation(model) as fused:
            assert fused == (architecture not in JOINT)
            quick = generating._steps(model, tokens)
    for one, other in zip(slow, quick, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_a_row_alone_is_edited_as_in_a_padded_batch_and_none_leaves_one_alone(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    seka, clean = lk.Seka(projections_of(model), 2.0), logits_of(model, tokens)
    own = [lk.Heads({0: [0]}), None, lk.Heads({1: [3], 2: [1]})]
    with lk.attend(model, [spans[0], None, spans[2]], seka, heads=own):
        together = logits_of(model, tokens)
    assert torch.equal(together[1], clean[1])
    for row in (0, 2):
        with lk.attend(model, spans[row], seka, heads=own[row]):
            alone = logits_of(model, chat_ids(model, [user(QUESTIONS[row])]))
        assert torch.allclose(alone[0], together[row], atol=2e-5)
        assert (alone[0] - clean[row]).abs().max() > 1e-3


def test_rows_of_a_batch_carry_edits_and_vectors_of_their_own_in_any_order_and_batch(model):
    vectors, spans = random_vectors(model), spans_of(model)
    heads = lk.Heads.all(model)
    seka = lk.Seka(projections_of(model), 3.0)
    other = lk.AdaSeka({"a": projections_of(model), "b": projections_of(model, 1)}, 3.0)
    rows = [
        lk.SteeringRow(QUESTIONS[0], attention=lk.AttentionEdit(spans[0], seka, heads)),
        lk.SteeringRow(QUESTIONS[1], attention=lk.AttentionEdit(spans[1], other, heads)),
        lk.SteeringRow(QUESTIONS[2]),
        lk.SteeringRow(
            QUESTIONS[2],
            vectors,
            0.3,
            attention=[
                lk.AttentionEdit(spans[2], lk.Pasta(0.01), heads),
                lk.AttentionEdit(spans[2], seka, heads),
            ],
        ),
    ]
    found = lk.generate_steered(model, rows, max_new_tokens=6)
    for batch_size in (1, 2):
        turned = lk.generate_steered(model, rows[::-1], max_new_tokens=6, batch_size=batch_size)
        assert turned[::-1] == found
    with lk.attend(model, spans[0], seka, heads=heads):
        assert found[0] == answers(model, QUESTIONS[0])
    with lk.attend(model, spans[1], other, heads=heads):
        assert found[1] == answers(model, QUESTIONS[1])
    assert found[2] == answers(model, QUESTIONS[2])
    with lk.attend(model, spans[2], seka, heads=heads), lk.steer(model, vectors, coefficient=0.3):
        with lk.attend(model, spans[2], lk.Pasta(0.01), heads=heads):
            assert found[3] == answers(model, QUESTIONS[2])


def test_a_score_policy_reads_edited_keys_whichever_context_is_the_outer_one(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    seka, heads = lk.Seka(projections_of(model), 2.0), lk.Heads.all(model)
    with lk.attend(model, spans, seka, heads=heads):
        with lk.attend(model, spans, lk.Spotlight(0.6)):
            one = read(model, tokens, ["attn.hook_pattern"])
    with lk.attend(model, spans, lk.Spotlight(0.6)):
        with lk.attend(model, spans, seka, heads=heads):
            other = read(model, tokens, ["attn.hook_pattern"])
    assert torch.equal(one[1], other[1])
    mass = (one[0]["blocks.0.attn.hook_pattern"] * key_mask(tokens, spans)[:, None, None]).sum(-1)
    assert (mass[:, :, -1] > 0.6 - 1e-5).all()


def test_nested_edits_of_keys_are_made_one_after_the_other(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    projections, heads = projections_of(model), lk.Heads.all(model, blocks=[0])
    clean, at = keys_of(model, tokens), list(span.positions)
    with lk.attend(model, span, lk.Seka(projections, 1.0), heads=heads):
        with lk.attend(model, span, lk.Seka(projections, 0.0, 1.0), heads=heads):
            found = keys_of(model, tokens)
    eye = torch.eye(projections.positive.shape[-1])
    both = (eye + projections.positive[0] / 2) @ (eye + projections.negative[0] / 2)
    expected = torch.einsum("phd,hde->phe", clean[0, 0, at], both)
    assert torch.allclose(found[0, 0, at], expected, atol=1e-4)


def test_the_first_token_is_left_out_on_demand(model):
    question = QUESTIONS[0]
    span = lk.span(model, question, tokens=(0, 4))
    tokens, seka = chat_ids(model, [user(question)]), lk.Seka(projections_of(model))
    heads, clean = lk.Heads.all(model, blocks=[0]), keys_of(model, tokens)
    for protect in (False, True):
        with lk.attend(model, span, seka, heads=heads, protect_bos=protect):
            moved = (keys_of(model, tokens) != clean)[0, 0].flatten(1).any(-1)
        assert moved.nonzero()[:, 0].tolist() == list(range(int(protect), 4))
    alone = lk.span(model, question, tokens=(0, 1))
    with pytest.raises(ValueError, match="the first token alone"):
        with lk.attend(model, alone, seka, heads=heads, protect_bos=True):
            pass


def test_a_cache_that_was_filled_outside_is_refused_and_one_from_inside_keeps_the_edit(model):
    span, hf_model = spans_of(model)[0], model.original_model
    ids = torch.tensor([span.ids])
    edit = partial(
        lk.attend, model, span, lk.Seka(projections_of(model)), heads=lk.Heads.all(model)
    )

    def one_more(cache):
        token = ids[:, :1]
        return hf_model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    with torch.no_grad():
        plain = hf_model(input_ids=ids, use_cache=True).past_key_values
        with edit():
            with pytest.raises(ValueError, match="in the cache, of which 0 were made"):
                one_more(plain)
            made = hf_model(input_ids=ids, use_cache=True).past_key_values
            longer = torch.cat([ids, ids[:, :1]], dim=1)
            inside = hf_model(input_ids=longer).logits[:, -1]
        assert torch.allclose(one_more(made), inside, atol=1e-4)
        assert not torch.allclose(one_more(plain), inside, atol=1e-2)


def test_an_exception_inside_leaves_the_model_as_it_was(model, monkeypatch):
    from lenskit.attention.keys import ActiveKeys

    span, tokens = spans_of(model)[0], chat_ids(model, [user(QUESTIONS[0])])
    clean = logits_of(model, tokens)
    modules = [block.original_component.self_attn for block in model.blocks]

    def fails(self, block, keys, hook):
        raise KeyError("inside")

    monkeypatch.setattr(ActiveKeys, "_hooked", fails)
    with pytest.raises(KeyError):
        with lk.attend(model, span, lk.Seka(projections_of(model)), heads=lk.Heads.all(model)):
            lk.generate(model, QUESTIONS[0], max_new_tokens=3)
    assert torch.equal(logits_of(model, tokens), clean)
    assert [block.original_component.self_attn for block in model.blocks] == modules


def test_a_batch_that_is_not_the_spans_prompt_is_refused(model):
    heads = lk.Heads.all(model)
    with lk.attend(model, spans_of(model)[0], lk.Seka(projections_of(model)), heads=heads):
        with pytest.raises(ValueError, match="does not begin with the prompt"):
            lk.generate(model, "Another question.", max_new_tokens=1)


def test_what_an_edit_of_keys_cannot_mean_is_refused(model):
    span, projections = spans_of(model)[0], projections_of(model)
    seka, heads = lk.Seka(projections), lk.Heads({0: [0]})
    for options, message in (
        ({}, "needs heads"),
        ({"heads": heads, "queries": "generated"}, "queries cannot be given with Seka"),
        ({"heads": heads, "start": 3}, "start cannot be given"),
        ({"heads": heads, "schedule": lambda step: step}, "schedule cannot be given"),
        ({"heads": lk.Heads({9: [0]})}, "not in this model"),
    ):
        with pytest.raises(ValueError, match=message):
            with lk.attend(model, span, seka, **options):
                pass
    with pytest.raises(TypeError, match="KeyProjections"):
        lk.Seka(torch.eye(3))
    with pytest.raises(ValueError, match="gain must be a finite number"):
        lk.Seka(projections, float("nan"))
    with pytest.raises(ValueError, match="experts"):
        lk.AdaSeka({})
    with pytest.raises(ValueError, match="components"):
        lk.AdaSeka({"a": projections}, components=99)


@pytest.mark.parametrize("architecture", ["llama4", "deepseek_v2"])
def test_a_model_whose_keys_cannot_be_edited_is_refused_with_the_reason(architecture):
    model = tiny.shared_model(architecture)
    reason = {"llama4": "in proportion", "deepseek_v2": "does not fire"}[architecture]
    with pytest.raises(ModelCheckError, match=reason):
        head_hooks(model)


def test_a_policy_of_ones_own_has_maps_and_weights(model):
    class Doubled:
        """The span's keys, twice as long."""

        def maps(self, model):
            hooks = head_hooks(model)
            return torch.eye(hooks.d_head).expand(1, model.cfg.n_layers, hooks.kv_heads, -1, -1)

        def weights(self, model, spans):
            return torch.ones(len(spans), 1, model.cfg.n_layers, head_hooks(model).kv_heads)

    class Wrong(Doubled):
        def weights(self, model, spans):
            return torch.ones(len(spans), 1)

    assert isinstance(Doubled(), KeyPolicy)
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    clean, at = keys_of(model, tokens), list(span.positions)
    with lk.attend(model, span, Doubled(), heads=lk.Heads.all(model, blocks=[0])):
        assert torch.allclose(keys_of(model, tokens)[0, 0, at], 2 * clean[0, 0, at])
    with pytest.raises(ValueError, match="weights of the key policy must be"):
        with lk.attend(model, span, Wrong()):
            pass


def test_an_adaptive_mixture_is_weighted_by_the_query_of_the_last_token(model):
    questions, spans = QUESTIONS[:2], spans_of(model)[:2]
    one, other = projections_of(model), projections_of(model, 1)
    policy = lk.AdaSeka({"one": one, "other": other}, gain=0.5, components=2)
    weights = policy.weights(model, spans)
    tokens = chat_ids(model, [user(q) for q in questions])
    seen, _ = read(model, tokens, ["attn.q.hook_out"])
    clean = keys_of(model, tokens)
    q = torch.stack([seen[f"blocks.{b}.attn.q.hook_out"][:, -1] for b in range(3)], dim=1)
    for row in range(2):
        for block in range(3):
            for kv in range(2):
                mean = q[row, block, 2 * kv : 2 * kv + 2].mean(dim=0)
                sums = [
                    sum(
                        each.relevant_mass[block, kv, i] * mean @ each.relevant[block, kv, :, i]
                        for i in range(2)
                    )
                    for each in (one, other)
                ]
                most = max(abs(each) for each in sums)
                expected = torch.stack(sums) / most
                assert torch.allclose(weights[row, :, block, kv], expected, atol=1e-4)
    with lk.attend(model, spans, policy, heads=lk.Heads.all(model, blocks=[0])):
        found = keys_of(model, tokens)
    inside = key_mask(tokens, spans)
    for row in range(2):
        k = clean[row, 0, inside[row]]
        change = torch.zeros_like(k)
        for number, each in enumerate((one, other)):
            top = each.relevant[0, :, :, :2]
            part = torch.einsum("phd,hdc,hec->phe", k, top, top)
            change += weights[row, number, 0, :, None] * part
        assert torch.allclose(found[row, 0, inside[row]], k + 0.5 * change, atol=1e-4)


def test_queries_are_read_without_the_edits_around(model):
    span, experts = spans_of(model)[0], {"a": projections_of(model), "b": projections_of(model, 1)}
    policy = lk.AdaSeka(experts)
    clean = policy.weights(model, [span])
    with lk.steer(model, random_vectors(model), coefficient=2.0):
        with lk.attend(model, [None, span], lk.Knockout()):
            assert torch.allclose(policy.weights(model, [span]), clean, atol=1e-4)
