from __future__ import annotations

import math
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered import random_vectors

import lenskit as lk
from lenskit.models import (
    ModelCheckError,
    chat_ids,
    generating,
)

pytestmark = pytest.mark.usefixtures("nothing_left_on")

# Edits of the scores are discarded by the bridges of these.
ARCHITECTURES = [name for name in tiny.ARCHITECTURES if name not in tiny.DISCARD_EDITS]
FUSED = [name for name in ARCHITECTURES if name != "bloom"]
GENERATING = ["llama-gqa", "gpt2", "gemma2", "mistral-window", "gpt_oss", "bloom"]


def mostly_slow(names):
    """The architectures, those that have nothing of their own among the slow tests."""
    return [
        name if name in GENERATING else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


INSTRUCTION = "Answer in one word."
QUESTIONS = [
    f"{INSTRUCTION} What is the scariest thing in the world?",
    f"Rain? {INSTRUCTION}",
    f"Libraries should stay open on Sundays. {INSTRUCTION} Why?",
]
HEADS = lk.Heads({0: [1], 2: [0, 3]})


def user(text):
    return [{"role": "user", "content": text}]


def spans_of(model, questions=QUESTIONS):
    return [lk.span(model, question, INSTRUCTION) for question in questions]


def patterns(model, tokens):
    """The pattern of every block and the logits, from plain hooks; padded queries left out."""
    seen = {}

    def read(value, hook):
        seen[hook.name] = value.float().clone()

    names = [f"blocks.{block}.attn.hook_pattern" for block in range(model.cfg.n_layers)]
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, read) for name in names]):
        logits = model(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    stacked = torch.stack([seen[name] for name in names], dim=1)
    real = tokens.attention_mask.bool()
    return stacked.masked_fill(~real[:, None, None, :, None], 0.0), logits[:, -1].float()


def key_mask(tokens, spans):
    """Which keys of the padded batch the spans hold, found without the library's positions."""
    mask = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    for row, span in enumerate(spans):
        padding = mask.shape[1] - span.length
        mask[row, [padding + position for position in span.positions]] = True
    return mask


def scaled(clean, factor):
    """Weights of the keys multiplied and normalised again; what a sink takes counts as a key."""
    sink = (1 - clean.sum(-1, keepdim=True)).clamp(min=0)
    weighted = clean * factor
    total = weighted.sum(-1, keepdim=True) + torch.where(sink < 1e-6, 0.0, sink)
    return torch.where(total > 0, weighted / total, 0.0)


@pytest.mark.parametrize("architecture", mostly_slow([*ARCHITECTURES, "gpt_oss"]))
def test_pasta_is_scaling_and_normalising_the_pattern_of_the_chosen_heads(architecture):
    model = tiny.shared_model(architecture)
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    heads = lk.Heads({0: [1, 2]})
    clean, _ = patterns(model, tokens)
    with lk.attend(model, spans, lk.Pasta(alpha=0.05), heads=heads):
        edited_patterns, logits = patterns(model, tokens)
    factor = torch.where(key_mask(tokens, spans), 1.0, 0.05)[:, None, None]
    expected = scaled(clean[:, 0, [1, 2]], factor)
    # What a sink takes is only known as what the others leave.
    tolerance = 5e-6 if architecture == "gpt_oss" else 1e-6
    assert (edited_patterns[:, 0, [1, 2]] - expected).abs().max() < tolerance
    others = [head for head in range(model.cfg.n_heads) if head not in (1, 2)]
    assert torch.equal(edited_patterns[:, 0, others], clean[:, 0, others])
    assert (logits - patterns(model, tokens)[1]).abs().max() > 0
    assert torch.equal(patterns(model, tokens)[0], clean)


@pytest.mark.parametrize("architecture", mostly_slow([*ARCHITECTURES, "gpt_oss"]))
def test_spotlight_reaches_its_target_where_the_mass_is_between_zero_and_it(architecture):
    model = tiny.shared_model(architecture)
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    keys = key_mask(tokens, spans)[:, None, None, None]
    clean, _ = patterns(model, tokens)
    with lk.attend(model, spans, lk.Spotlight(0.6), heads=lk.Heads.all(model, blocks=[0])):
        raised, _ = patterns(model, tokens)
    before, after = ((each * keys).sum(-1)[:, 0] for each in (clean, raised))
    meant = (before > 0) & (before < 0.6)
    assert meant.any() and (after[meant] - 0.6).abs().max() < 1e-5
    assert torch.allclose(after[~meant], before[~meant], atol=1e-6)


def test_the_published_spotlight_falls_short_of_its_target(model):
    tokens, spans = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[:1]
    keys = key_mask(tokens, spans)[:, None, None, None]
    clean, _ = patterns(model, tokens)
    mass = (clean * keys).sum(-1)[0, 0]
    pooled = float(mass[mass > 0].mean())
    target = pooled + 0.2
    with lk.attend(model, spans, lk.Spotlight(target, published=True)):
        raised, _ = patterns(model, tokens)
    ratio = target / pooled
    expected = mass * ratio / (1 + mass * (ratio - 1))
    assert torch.allclose((raised * keys).sum(-1)[0, 0], expected, atol=1e-5)
    assert float((raised * keys).sum(-1)[0, 0][mass > 0].mean()) < target


@pytest.mark.parametrize(
    ("policy", "factor"),
    [
        (lk.LogitBias(1.5), (math.exp(1.5), 1.0)),
        (lk.InstABoost(4), (4.0, 1.0)),
        (lk.Knockout(), (0.0, 1.0)),
        (lk.Pasta(0.2, mode="include"), (1.0, 5.0)),
        (lk.Pasta(0.0), (1.0, 0.0)),
    ],
)
def test_a_static_policy_multiplies_the_weights_of_span_and_rest(model, policy, factor):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    heads = lk.Heads.all(model, blocks=[0])
    last = [lk.span(model, q, tokens=(-1, s.length)) for q, s in zip(QUESTIONS, spans, strict=True)]
    clean, _ = patterns(model, tokens)
    with lk.attend(model, spans, policy, heads=heads, queries=last):
        found, _ = patterns(model, tokens)
    inside, outside = factor
    factors = torch.where(key_mask(tokens, spans), inside, outside)[:, None, None]
    expected = scaled(clean[:, 0], factors)
    assert (found[:, 0, :, -1] - expected[:, :, -1]).abs().max() < 1e-6
    assert torch.equal(found[:, 0, :, :-1], clean[:, 0, :, :-1])


def test_include_is_exclude_with_the_inverse_alpha(model):
    tokens, spans = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    found = []
    for policy in (lk.Pasta(0.1, mode="include"), lk.Pasta(10.0)):
        with lk.attend(model, spans, policy, heads=HEADS):
            found.append(patterns(model, tokens)[1])
    assert torch.allclose(*found, atol=1e-5)


def test_several_spans_act_as_their_union(model):
    question = QUESTIONS[2]
    one, other = lk.span(model, question, "Libraries"), lk.span(model, question, INSTRUCTION)
    tokens = chat_ids(model, [user(question)])
    clean, _ = patterns(model, tokens)
    with lk.attend(model, one | other, lk.Pasta(0.01), heads=lk.Heads({0: [1]})):
        found, _ = patterns(model, tokens)
    inside = key_mask(tokens, [one]) | key_mask(tokens, [other])
    expected = scaled(clean[:, 0, 1], torch.where(inside, 1.0, 0.01)[:, None])
    assert (found[:, 0, 1] - expected).abs().max() < 1e-6


def test_a_temperature_divides_the_scores(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    clean, _ = patterns(model, tokens)
    with lk.attend(model, span, lk.Temperature(0.5), heads=lk.Heads.all(model, blocks=[0])):
        found, _ = patterns(model, tokens)
    expected = clean[:, 0] ** 2
    expected = expected / expected.sum(-1, keepdim=True)
    assert (found[:, 0] - expected).abs().max() < 1e-6


def test_a_strength_for_each_token_of_the_span(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    strengths = tuple(0.1 * i for i in range(len(span)))
    clean, _ = patterns(model, tokens)
    with lk.attend(model, span, lk.LogitBias(strengths), heads=lk.Heads.all(model, blocks=[0])):
        found, _ = patterns(model, tokens)
    factor = torch.ones(span.length)
    factor[list(span.positions)] = torch.tensor(strengths).exp()
    assert (found[:, 0] - scaled(clean[:, 0], factor)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=f"2 numbers for a span of {len(span)} tokens"):
        with lk.attend(model, span, lk.LogitBias((1.0, 2.0))):
            patterns(model, tokens)


def test_a_policy_of_ones_own_is_a_function_of_the_view(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]

    def own(view):
        return math.log(4) * view.span

    with lk.attend(model, span, own):
        one = patterns(model, tokens)[1]
    with lk.attend(model, span, lk.InstABoost(4)):
        assert torch.equal(patterns(model, tokens)[1], one)
    with pytest.raises(ValueError, match="not a number"):
        with lk.attend(model, span, lambda view: view.span * float("nan")):
            patterns(model, tokens)


def test_the_first_token_is_protected_on_demand(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    clean, _ = patterns(model, tokens)
    with lk.attend(model, span, lk.Pasta(0.01), heads=lk.Heads({0: [0]}), protect_bos=True):
        found, _ = patterns(model, tokens)
    inside = key_mask(tokens, [span])
    inside[:, 0] = True
    expected = scaled(clean[:, 0, 0], torch.where(inside, 1.0, 0.01)[:, None])
    assert (found[:, 0, 0] - expected).abs().max() < 1e-6


def test_padded_and_future_keys_stay_unseen(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    with lk.attend(model, spans, lk.LogitBias(50.0)):
        found, _ = patterns(model, tokens)
    hidden = ~tokens.attention_mask.bool()[:, None, None, None].expand_as(found)
    assert (found[hidden] == 0).all()
    assert (found.triu(1) == 0).all()


def test_queries_choose_rows_of_the_pattern(model):
    question = QUESTIONS[2]
    tokens, span = chat_ids(model, [user(question)]), lk.span(model, question, INSTRUCTION)
    asking = lk.span(model, question, "Why?")
    heads = lk.Heads.all(model, blocks=[0])
    clean, _ = patterns(model, tokens)
    edit = partial(lk.attend, model, span, lk.LogitBias(2.0), heads=heads)
    for options, rows in (
        ({"queries": asking}, set(asking.positions)),
        ({"start": 12}, set(range(12, span.length))),
        ({"queries": "prompt"}, set(range(span.length))),
        ({"queries": "generated"}, set()),
    ):
        with edit(**options):
            found, _ = patterns(model, tokens)
        changed = (found[0, 0] != clean[0, 0]).any(-1).any(0).nonzero()[:, 0].tolist()
        seeing = {row for row in rows if row >= span.positions[0]}
        # A query that sees nothing outside the span has nothing to shift.
        assert set(changed) <= seeing and len(seeing - set(changed)) <= len(span)


def test_a_row_alone_is_edited_as_in_a_batch(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    for policy in (lk.Pasta(0.01), lk.Spotlight(0.5)):
        with lk.attend(model, spans, policy, heads=HEADS):
            together = patterns(model, tokens)[1]
        for row, question in enumerate(QUESTIONS):
            with lk.attend(model, spans[row], policy, heads=HEADS):
                alone = patterns(model, chat_ids(model, [user(question)]))[1]
            assert torch.allclose(alone[0], together[row], atol=2e-5)


def test_a_row_without_a_span_is_left_alone_and_heads_may_differ_by_row(model):
    tokens, spans = chat_ids(model, [user(q) for q in QUESTIONS]), spans_of(model)
    clean = patterns(model, tokens)[1]
    own = [lk.Heads({0: [0]}), None, lk.Heads({2: [1]})]
    with lk.attend(model, [spans[0], None, spans[2]], lk.Pasta(0.01), heads=own):
        found = patterns(model, tokens)[1]
    assert torch.equal(found[1], clean[1])
    for row in (0, 2):
        with lk.attend(model, spans[row], lk.Pasta(0.01), heads=own[row]):
            alone = patterns(model, chat_ids(model, [user(QUESTIONS[row])]))[1]
        assert torch.allclose(found[row], alone[0], atol=2e-5)


def test_nested_static_edits_add_up(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    with lk.attend(model, span, lk.LogitBias(0.5)), lk.attend(model, span, lk.LogitBias(0.7)):
        nested = patterns(model, tokens)[0]
    with lk.attend(model, span, lk.LogitBias(1.2)):
        assert torch.allclose(patterns(model, tokens)[0], nested, atol=1e-6)


def test_a_policy_that_reads_masses_reads_them_under_the_edits_outside_it(model):
    tokens, span = chat_ids(model, [user(QUESTIONS[0])]), spans_of(model)[0]
    keys, first = key_mask(tokens, [span])[:, None, None, None], lk.Heads.all(model, blocks=[0])
    for outer in (lk.LogitBias(-3.0), lk.LogitBias(3.0)):
        with (
            lk.attend(model, span, outer, heads=first),
            lk.attend(model, span, lk.Spotlight(0.5), heads=first),
        ):
            found, _ = patterns(model, tokens)
        mass = (found * keys).sum(-1)[0, 0, :, span.positions[0] :]
        assert mass.min() > 0.5 - 1e-5


def test_cutting_the_last_key_of_a_query_is_an_error(model):
    tokens = chat_ids(model, [user(QUESTIONS[0])])
    whole = lk.span(model, QUESTIONS[0], tokens=(0, tokens.input_ids.shape[1]))
    for run in (
        lambda: patterns(model, tokens),
        lambda: lk.generate(model, QUESTIONS[0], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="no key to attend to"):
            with lk.attend(model, whole, lk.Knockout()):
                run()


def answers(model, questions=QUESTIONS, **options):
    return [a.token_ids for a in lk.generate(model, questions, max_new_tokens=6, **options)]


def eager(model):
    """A hook inside attention, which keeps generation from fused attention."""
    return model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: None)])


POLICIES = [lk.Pasta(0.01), lk.Spotlight(0.7), lk.Temperature(0.5), lk.Knockout()]


def written_by_hand(model, span, policy, number, **options):
    """Greedy tokens from uncached forward passes."""
    ids = torch.tensor([span.ids])
    for _ in range(number):
        with lk.attend(model, span, policy, **options), torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, span.length :].tolist())


@pytest.mark.parametrize("architecture", GENERATING)
def test_cached_generation_equals_uncached_passes_fused_or_not(architecture):
    model = tiny.shared_model(architecture)
    spans = spans_of(model)
    for policy in (lk.Pasta(0.01), lk.Spotlight(0.7)):
        with lk.attend(model, spans, policy, heads=lk.Heads.all(model)):
            quick = answers(model)
            with eager(model):
                assert answers(model) == quick
        with lk.attend(model, spans[0], policy, heads=lk.Heads.all(model)):
            assert answers(model, QUESTIONS[:1])[0] == quick[0]
        by_hand = written_by_hand(model, spans[0], policy, 6, heads=lk.Heads.all(model))
        assert by_hand[: len(quick[0])] == quick[0]
    assert (generating.obstacle(model) == "") == (architecture in (*FUSED, "gpt_oss"))


@pytest.mark.parametrize("architecture", mostly_slow(FUSED))
def test_fused_generation_gives_the_logits_of_eager_attention(architecture):
    model = tiny.shared_model(architecture)
    tokens = chat_ids(model, [user(q) for q in QUESTIONS])
    spans = spans_of(model)
    for policy in POLICIES if architecture == "llama-gqa" else POLICIES[:2]:
        with lk.attend(model, spans, policy, heads=lk.Heads.all(model)):
            slow = generating._steps(model, tokens)
            with generating.fused_generation(model) as fused:
                assert fused
                quick = generating._steps(model, tokens)
        for one, other in zip(slow, quick, strict=True):
            assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(3)), st.integers(1, 3), st.sampled_from(POLICIES))
def test_answers_do_not_depend_on_the_batch(order, batch_size, policy):
    model = tiny.shared_model()
    spans = spans_of(model)
    rows = [
        lk.SteeringRow(QUESTIONS[i], attention=lk.AttentionEdit(spans[i], policy, HEADS))
        for i in order
    ]
    found = lk.generate_steered(model, rows, max_new_tokens=5, batch_size=batch_size)
    for i, answer in zip(order, found, strict=True):
        with lk.attend(model, spans[i], policy, heads=HEADS):
            assert lk.generate(model, QUESTIONS[i], max_new_tokens=5) == answer


def test_rows_carry_edits_and_vectors_of_their_own(model):
    vectors, spans = random_vectors(model), spans_of(model)
    edit = lk.AttentionEdit(spans[0], lk.Pasta(0.01), HEADS)
    other = lk.AttentionEdit(spans[0], lk.Spotlight(0.5))
    question = QUESTIONS[0]
    rows = [
        lk.SteeringRow(question),
        lk.SteeringRow(question, vectors, 0.3),
        lk.SteeringRow(user(question), attention=edit),
        lk.SteeringRow(question, vectors, 0.3, attention=[edit, other]),
    ]
    plain, steered, emphasised, both = lk.generate_steered(model, rows, max_new_tokens=6)
    assert plain == lk.generate(model, question, max_new_tokens=6)
    with lk.steer(model, vectors, coefficient=0.3):
        assert steered == lk.generate(model, question, max_new_tokens=6)
        with lk.attend(model, spans[0], lk.Pasta(0.01), heads=HEADS):
            with lk.attend(model, spans[0], lk.Spotlight(0.5)):
                assert both == lk.generate(model, question, max_new_tokens=6)
    with lk.attend(model, spans[0], lk.Pasta(0.01), heads=HEADS):
        assert emphasised == lk.generate(model, question, max_new_tokens=6)
    with pytest.raises(ValueError, match="prefix='Be brief.' goes before a question"):
        lk.generate_steered(model, [lk.SteeringRow(user(question), prefix="Be brief.")])


def test_steering_and_edits_nest_in_any_order(model):
    vectors, span = random_vectors(model), spans_of(model)[0]
    with lk.steer(model, vectors, coefficient=0.3), lk.attend(model, span, lk.Spotlight(0.5)):
        one = lk.generate(model, QUESTIONS[0], max_new_tokens=6)
    with lk.attend(model, span, lk.Spotlight(0.5)), lk.steer(model, vectors, coefficient=0.3):
        assert lk.generate(model, QUESTIONS[0], max_new_tokens=6) == one


def test_a_schedule_weakens_the_bias_with_the_tokens_written(model):
    span = spans_of(model)[0]
    steps = []

    def fading(step):
        steps.append(step.unique().tolist())
        return 0.5**step

    with lk.attend(model, span, lk.LogitBias(3.0), schedule=fading):
        quick = answers(model, QUESTIONS[:1])[0]
    assert [s for found in steps for s in found] == list(range(len(quick)))
    by_hand = written_by_hand(model, span, lk.LogitBias(3.0), 6, schedule=lambda step: 0.5**step)
    assert by_hand[: len(quick)] == quick


def test_generated_tokens_alone_are_edited_on_demand(model):
    span = spans_of(model)[0]
    plain = answers(model, QUESTIONS[:1])[0]
    with lk.attend(model, span, lk.LogitBias(5.0), queries="generated"):
        found = answers(model, QUESTIONS[:1])[0]
    assert found[0] == plain[0]
    by_hand = written_by_hand(model, span, lk.LogitBias(5.0), 6, queries="generated")
    assert by_hand[: len(found)] == found


def test_a_capture_inside_sees_the_edited_pattern(model):
    concept = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, concept, number=2)
    ids = prompts.tokens.input_ids[0][prompts.tokens.attention_mask[0].bool()].tolist()
    prefix = lk.Span(
        tuple(prompts.prefix_mask[0][-len(ids) :].nonzero()[:, 0].tolist()), tuple(ids)
    )
    heads = lk.Heads.all(model, blocks=[0])
    with lk.attend(model, [prefix, None], lk.Spotlight(0.99), heads=heads):
        found = lk.capture(model, prompts, progress=False)
    assert found.attention_to_prefix[0, 0].min() > 0.99 - 1e-5
    assert (found.attention_to_prefix[1] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, span: lk.attend(model, span, lk.Pasta()), "needs heads"),
        (lambda model, span: lk.attend(model, span, lk.Pasta(), heads=lk.Heads()), "empty"),
        (lambda model, span: lk.attend(model, span, lk.Pasta(), heads=lk.Heads([(9, 0)])), "has 3"),
        (lambda model, span: lk.attend(model, span, lk.InstABoost(), queries="last"), "queries"),
        (lambda model, span: lk.attend(model, [span], lk.InstABoost(), heads=[None] * 2), "rows"),
        (lambda model, span: lk.attend(model, [span] * 2, lk.InstABoost()), "for 2 rows"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_refused(model, make, message):
    span = spans_of(model)[0]
    with pytest.raises(ValueError, match=message):
        with make(model, span):
            patterns(model, chat_ids(model, [user(QUESTIONS[0])]))


@pytest.mark.parametrize(
    "make",
    [
        partial(lk.LogitBias, float("inf")),
        partial(lk.LogitBias, ()),
        partial(lk.Pasta, -1.0),
        partial(lk.Pasta, 0.0, mode="include"),
        partial(lk.Pasta, mode="both"),
        partial(lk.InstABoost, 0.0),
        partial(lk.Spotlight, 1.0),
        partial(lk.Temperature, 0.0),
    ],
)
def test_a_policy_out_of_its_range_is_refused(make):
    with pytest.raises(ValueError):
        make()


def test_a_batch_that_is_not_the_spans_prompt_is_refused(model):
    span = spans_of(model)[0]
    with lk.attend(model, span, lk.InstABoost()):
        with pytest.raises(ValueError, match="does not begin with the prompt"):
            lk.generate(model, "Another question.", max_new_tokens=1)
        with pytest.raises(ValueError, match=r"row \d of the batch"):
            lk.generate(model, [QUESTIONS[0], QUESTIONS[1]], max_new_tokens=1)


@pytest.mark.parametrize("architecture", tiny.DISCARD_EDITS[:2])
def test_a_model_that_discards_edits_is_refused(architecture):
    model = tiny.shared_model(architecture)
    with pytest.raises(ModelCheckError, match="does not change this model's logits"):
        with lk.attend(model, spans_of(model)[0], lk.InstABoost()):
            pass


def test_an_exception_inside_leaves_the_model_as_it_was(model):
    span, tokens = spans_of(model)[0], chat_ids(model, [user(QUESTIONS[0])])
    clean = patterns(model, tokens)[1]
    modules = [block.original_component.self_attn for block in model.blocks]
    failing = [0]

    def fails_later(view):
        failing[0] += 1
        if failing[0] > 2:
            raise KeyError("later")
        return 2.0 * view.span

    with pytest.raises(KeyError):
        with lk.attend(model, span, fails_later):
            lk.generate(model, QUESTIONS[0], max_new_tokens=5)
    assert torch.equal(patterns(model, tokens)[1], clean)
    assert [block.original_component.self_attn for block in model.blocks] == modules


def test_the_landing_check_edits_one_head_alone_and_sees_whether_it_lands(model):
    seen = []

    def watch(value, hook):
        seen.append(value.clone())

    names = [("blocks.0.attn.hook_pattern", watch)]
    with model.hooks(fwd_hooks=names):
        report = lk.check_model(model)
    clean = seen[0]
    alone = [
        (value != clean).flatten(2).any(-1).any(0).sum().item()
        for value in seen
        if value.shape == clean.shape
    ]
    assert 1 in alone and "attn.hook_attn_scores" in report.edits


def test_an_edit_that_changes_nothing_does_not_land(model, monkeypatch):
    from lenskit.models import check

    kept = check._edits
    monkeypatch.setattr(
        check,
        "_edits",
        lambda tokens, heads: kept(tokens, heads) | {check.SCORES: [lambda scores, hook: scores]},
    )
    try:
        assert check.SCORES not in check.check_model(model).edits
    finally:
        monkeypatch.undo()
        check.check_model(model)
