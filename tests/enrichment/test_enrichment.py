from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, spearmanr
from tiny import reference_model, tiny_folder

from benchmarks.false_positives import rates
from lenskit.concepts import Concept
from lenskit.enrichment import Enrichment, enrich, permutation, rank_stability
from lenskit.enrichment.permutation import (
    NO_KEY,
    NO_SET,
    key_sets,
    number_of_sets,
    permutation_p_values,
    pooled,
    prefix_mass,
    prefix_weights,
    text_keys,
)
from lenskit.models import Tokens, load_model
from lenskit.prompts import PromptSet, build_prompts
from lenskit.selector import TokenSelection

PADDING = 9


def made_prompts(
    lengths: list[int],
    *,
    size: int = 2,
    start: int = 3,
    candidates: int = 2,
    padding: int = 0,
    paired: bool = False,
    seed: int = 0,
) -> PromptSet:
    """Prompts of random text whose prefix is the ``size`` tokens from ``start`` on.

    With ``paired`` each is followed by the same tokens without the prefix.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, prefixes = [], []
    for length in lengths:
        text = torch.randint(10, 500, (length - candidates,), generator=generator)
        tokens = [*text.tolist(), *range(candidates)]
        inside = [start <= place < start + size for place in range(length)]
        ids.append(tokens)
        prefixes.append(inside)
        if paired:
            ids.append([token for token, drop in zip(tokens, inside, strict=True) if not drop])
            prefixes.append([False] * (length - size))
    width = max(map(len, ids)) + padding
    number = len(ids)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    padded = torch.tensor([[PADDING] * (width - len(row)) + row for row in ids])
    prefix = torch.tensor([[False] * (width - len(row)) + row for row in prefixes])
    return PromptSet(
        Concept("Take on a cheerful mood."),
        Tokens(padded, mask),
        prefix,
        prefix.any(dim=1),
        tuple(f"<{place}>" for place in range(candidates)),
        tuple(f"statement {row}" for row in range(number)),
        torch.arange(number) ^ 1 if paired else torch.full((number,), -1),
    )


def made_patterns(prompts: PromptSet, *, heads: int = 3, seed: int = 0) -> torch.Tensor:
    """Random attention of the candidate tokens: causal, none to padding, much to the first key.

    It depends on each prompt's length and place among its prompts, not on padding.
    """
    candidates = len(prompts.candidates)
    width = prompts.tokens.input_ids.shape[1]
    pattern = torch.zeros(len(prompts), heads, candidates, width)
    for row, length in enumerate(prompts.tokens.lengths.tolist()):
        scores = torch.randn(
            heads, candidates, length, generator=torch.Generator().manual_seed(seed + row)
        )
        scores[:, :, 0] += 3
        for c in range(candidates):
            scores[:, c, length - candidates + c + 1 :] = -torch.inf
        pattern[row, :, :, width - length :] = scores.softmax(dim=-1)
    return pattern


def p_values(prompts: PromptSet, pattern: torch.Tensor, **options) -> torch.Tensor:
    """The tested path from patterns to p-values for the prompts with a prefix."""
    rows = prompts.has_prefix.nonzero().flatten()
    mass = prefix_mass(pattern[rows], prompts.prefix_mask[rows])
    read = pattern[rows]
    if options.get("null") == "paired":
        own, other = (text_keys(prompts, rows, paired=each) for each in (False, True))
        weights = prefix_weights(read, prompts.prefix_mask[rows], prefix_size(prompts))
        read = pooled(pattern[prompts.pair[rows]], other, prefix_mass(read, own), weights)
    return permutation_p_values(read, key_sets(prompts, rows, **options), mass)


def prefix_size(prompts: PromptSet) -> int:
    return int(prompts.prefix_mask.sum(dim=1).max())


def pooled_by_hand(prompts: PromptSet, pattern: torch.Tensor) -> torch.Tensor:
    """Each prompt's attention; that without a prefix in units of its pair's, whose prefix follows.

    One number after the other, for prompts whose prefix is not at the beginning.
    """
    places = prefix_size(prompts)
    result = torch.nn.functional.pad(pattern.double(), (0, places))
    width = pattern.shape[-1]
    for row in prompts.has_prefix.nonzero().flatten().tolist():
        prefix = prompts.prefix_mask[row].nonzero().flatten().tolist()
        other = int(prompts.pair[row])
        first, second = (width - int(prompts.tokens.lengths[each]) + 1 for each in (row, other))
        for head in range(pattern.shape[1]):
            for c in range(pattern.shape[2]):
                weights, found = pattern[row, head, c].double(), result[other, head, c]
                text = sum(float(weights[k]) for k in range(first, width) if k not in prefix)
                own = sum(float(found[k]) for k in range(second, width))
                for key in range(width):
                    found[key] *= text / own
                for place, key in enumerate(reversed(prefix), 1):
                    found[-place] = weights[key]
    return result


def real_sets(prompts: PromptSet, rows: list[int], **options) -> list[list[list[tuple[int, ...]]]]:
    """Each prompt's and candidate's sets as columns of the padded prompts."""
    sets = key_sets(prompts, torch.tensor(rows), **options)
    width = prompts.tokens.input_ids.shape[1]
    width += prefix_size(prompts) if options.get("null") == "paired" else 0
    columns = [
        [
            [tuple(width + key for key in keys if key != NO_KEY) for keys in of_candidate]
            for of_candidate in of_prompt
        ]
        for of_prompt in sets.keys.tolist()
    ]
    for of_prompt, numbers in zip(columns, sets.number.tolist(), strict=True):
        for c, number in enumerate(numbers):
            assert all(width + NO_SET in keys for keys in of_prompt[c][number:])
            of_prompt[c] = of_prompt[c][:number]
    return columns


def share_reaching(observed: float, masses: list[float]) -> float:
    """(b + 1) / (B + 1) as the definition says it, with room for rounding."""
    return (sum(mass >= observed - 1e-6 for mass in masses) + 1) / (len(masses) + 1)


def slow_p_values(prompts: PromptSet, pattern: torch.Tensor, sets_of) -> np.ndarray:
    """One test after the other; ``sets_of(row, candidate)`` gives the columns of each set."""
    rows = prompts.has_prefix.nonzero().flatten().tolist()
    weights = pattern.double().numpy()
    result = np.empty((len(rows), *pattern.shape[1:3]))
    for i, row in enumerate(rows):
        prefix = prompts.prefix_mask[row].nonzero().flatten().tolist()
        for head in range(pattern.shape[1]):
            for c in range(pattern.shape[2]):
                source, sets = sets_of(row, c)
                observed = sum(weights[row, head, c, key] for key in prefix)
                masses = [sum(weights[source, head, c, key] for key in keys) for keys in sets]
                result[i, head, c] = share_reaching(observed, masses)
    return result


def visible_keys(prompts: PromptSet, row: int, candidate: int) -> range:
    """Columns of the real keys up to the candidate token, without the first of the prompt."""
    width = prompts.tokens.input_ids.shape[1]
    first = width - int(prompts.tokens.lengths[row]) + 1
    return range(first, width - len(prompts.candidates) + candidate + 1)


def test_with_few_keys_the_p_value_is_the_share_of_all_subsets():
    prompts = made_prompts([9, 11, 8], size=3, candidates=3)
    pattern = made_patterns(prompts)

    def every_other_subset(row: int, c: int):
        prefix = tuple(prompts.prefix_mask[row].nonzero().flatten().tolist())
        keys = visible_keys(prompts, row, c)
        return row, [keys for keys in combinations(keys, 3) if keys != prefix]

    expected = slow_p_values(prompts, pattern, every_other_subset)
    assert comb(10, 3) <= 999
    np.testing.assert_allclose(p_values(prompts, pattern), expected, rtol=1e-6)


def test_drawn_sets_give_the_same_p_values_as_a_plain_loop_over_them():
    prompts = made_prompts([30, 24], size=5, candidates=3)
    pattern = made_patterns(prompts, heads=2)
    drawn = real_sets(prompts, [0, 1], draws=150)
    assert all(len(sets) == 150 for of_prompt in drawn for sets in of_prompt)
    expected = slow_p_values(prompts, pattern, lambda row, c: (row, drawn[row][c]))
    np.testing.assert_allclose(p_values(prompts, pattern, draws=150), expected, rtol=1e-6)


def test_windows_are_all_runs_of_keys_but_the_prefix_itself():
    prompts = made_prompts([14, 10, 19], size=3, candidates=3)
    pattern = made_patterns(prompts)
    weights = pattern.double().numpy()
    result = p_values(prompts, pattern, null="windows")
    for row in range(3):
        own = int(prompts.prefix_mask[row].nonzero()[0])
        for c in range(3):
            keys = visible_keys(prompts, row, c)
            total = np.concatenate([[0], np.cumsum(weights[row, :, c], axis=-1)[0]])
            masses = {s: total[s + 3] - total[s] for s in keys if s + 3 <= keys.stop}
            observed = masses.pop(own)
            expected = share_reaching(observed, list(masses.values()))
            assert float(result[row, 0, c]) == pytest.approx(expected)


def test_the_paired_null_draws_from_the_prefix_and_the_keys_of_the_prompt_without_it():
    prompts = made_prompts([12, 13], size=3, candidates=2, paired=True)
    pattern = made_patterns(prompts)

    def subsets(row: int, c: int):
        keys = [*visible_keys(prompts, row + 1, c), 13, 14, 15]
        return row + 1, [keys for keys in combinations(keys, 3) if keys != (13, 14, 15)]

    expected = slow_p_values(prompts, pooled_by_hand(prompts, pattern), subsets)
    np.testing.assert_allclose(p_values(prompts, pattern, null="paired"), expected, rtol=1e-6)


def test_paired_draws_give_the_same_p_values_as_a_plain_loop_over_them():
    prompts = made_prompts([25, 22], size=4, candidates=2, paired=True)
    pattern = made_patterns(prompts)
    drawn = dict(zip([0, 2], real_sets(prompts, [0, 2], null="paired", draws=99), strict=True))
    weights = pooled_by_hand(prompts, pattern)
    expected = slow_p_values(prompts, weights, lambda row, c: (row + 1, drawn[row][c]))
    result = p_values(prompts, pattern, null="paired", draws=99)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@given(
    lengths=st.lists(st.integers(12, 40), min_size=1, max_size=3),
    size=st.integers(1, 6),
    start=st.integers(0, 3),
    candidates=st.integers(1, 3),
    null=st.sampled_from(["keys", "windows", "paired"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_set_is_made_of_different_keys_that_the_candidate_sees_and_never_of_bos(
    lengths, size, start, candidates, null, seed
):
    paired = null == "paired"
    start = max(start, 1)
    prompts = made_prompts(
        lengths, size=size, start=start, candidates=candidates, padding=2, paired=paired
    )
    rows = prompts.has_prefix.nonzero().flatten()
    options = {"null": null, "draws": 30}
    sets = real_sets(prompts, rows.tolist(), seed=seed, **options)
    number = number_of_sets(prompts, rows, **options)
    for i, row in enumerate(rows.tolist()):
        for c in range(candidates):
            keys = set(visible_keys(prompts, row + paired, c))
            if paired:
                width = prompts.tokens.input_ids.shape[1]
                keys |= set(range(width, width + size))
            assert len(sets[i][c]) == number[i, c]
            for drawn in sets[i][c]:
                assert len(drawn) == len(set(drawn)) == size
                assert set(drawn) <= keys


def test_every_subset_of_the_visible_keys_is_drawn_equally_often():
    # Seven keys, of which the candidates see five, six and seven; ten draws for each of many
    # prompts, so that nothing is enumerated.
    prompts = made_prompts([8] * 600, size=2, start=2, candidates=3)
    drawn = real_sets(prompts, list(range(600)), draws=9)
    for c in range(3):
        every = list(combinations(visible_keys(prompts, 0, c), 2))
        counts = dict.fromkeys(every, 0)
        for of_prompt in drawn:
            for keys in of_prompt[c]:
                counts[tuple(sorted(keys))] += 1
        assert sum(counts.values()) == 5400
        assert chisquare(list(counts.values())).pvalue > 0.001


def assert_uniform(p: torch.Tensor) -> None:
    ranks = (p.flatten() * 100).round().long()
    assert 1 <= int(ranks.min()) and int(ranks.max()) <= 100
    counts = torch.bincount((ranks - 1) // 10, minlength=10)
    assert chisquare(counts.numpy()).pvalue > 0.001


def test_p_values_are_uniform_where_the_prefix_is_like_any_other_keys():
    prompts = made_prompts([26] * 500, size=4, candidates=1)
    pattern = torch.rand(500, 1, 1, 26, generator=torch.Generator().manual_seed(1))
    assert_uniform(p_values(prompts, pattern, draws=99))


def test_paired_p_values_are_uniform_whatever_the_first_token_takes_from_either_prompt():
    prompts = made_prompts([26] * 500, size=11, candidates=1, paired=True)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(500, 26, generator=generator)
    pattern = torch.zeros(1000, 1, 1, 26)
    without = scores[~prompts.prefix_mask[0].expand(500, -1)].view(500, 15)
    for first, of_scores, rows in (
        (0, scores, slice(0, None, 2)),
        (11, without, slice(1, None, 2)),
    ):
        of_scores = of_scores.clone()
        of_scores[:, 0] = 3 + torch.randn(500, generator=generator)
        pattern[rows, 0, 0, first:] = of_scores.softmax(dim=-1)
    assert_uniform(p_values(prompts, pattern, null="paired", draws=99))


def test_without_a_signal_hits_are_as_rare_as_the_docstring_says():
    for spread in (1.0, 2.0):
        found = rates("exchangeable, other first token in the pair", spread, 200, 30, 11, draws=199)
        assert max(found["keys"], found["paired"]) <= 0.03 and found["windows"] <= 0.07


def test_equal_attention_everywhere_is_not_significant():
    prompts = made_prompts([33, 20], size=6, candidates=2, paired=True)
    width = prompts.tokens.input_ids.shape[1]
    for null in ("keys", "windows", "paired"):
        pattern = torch.full((4, 2, 2, width), 1 / 33)
        assert bool((p_values(prompts, pattern, null=null) == 1).all())


def test_sums_of_the_same_weights_in_another_order_are_ties():
    prompts = made_prompts([20], size=3, candidates=1)
    weights = torch.tensor([0.1, 0.013, 0.0007])
    pattern = weights[torch.arange(20) % 3].view(1, 1, 1, 20)
    # Every window of three adjacent keys has the same weights, in three different orders.
    assert float(p_values(prompts, pattern, null="windows")) == 1.0


def test_a_prefix_without_attention_has_the_p_value_one():
    prompts = made_prompts([20], size=3, candidates=1)
    pattern = made_patterns(prompts)
    pattern[..., 3:6] = 0
    assert bool((p_values(prompts, pattern) == 1).all())


def test_all_attention_on_the_prefix_gives_the_smallest_p_value():
    prompts = made_prompts([30], size=3, candidates=2)
    pattern = torch.zeros(1, 1, 2, 30)
    pattern[..., 3:6] = 0.3
    assert bool((p_values(prompts, pattern, draws=199) == 1 / 200).all())
    sets = number_of_sets(prompts, torch.tensor([0]), null="windows")
    assert sets.tolist() == [[25, 26]]
    # The windows that overlap it have less.
    assert p_values(prompts, pattern, null="windows").flatten().tolist() == pytest.approx(
        [1 / 26, 1 / 27]
    )


def test_a_prefix_that_starts_the_prompt_is_compared_with_sets_that_may_hold_the_first_key():
    prompts = made_prompts([9], size=2, start=0, candidates=1)
    sets = real_sets(prompts, [0])[0][0]
    assert sorted(sets) == [keys for keys in combinations(range(9), 2) if keys != (0, 1)]


@given(
    lengths=st.lists(st.integers(12, 30), min_size=2, max_size=5),
    padding=st.integers(1, 7),
    null=st.sampled_from(["keys", "windows", "paired"]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_p_values_do_not_depend_on_padding_batch_or_order(lengths, padding, null, data):
    paired = null == "paired"
    options = {"null": null, "draws": 60}
    prompts = made_prompts(lengths, candidates=2, paired=paired)
    pattern = made_patterns(prompts)
    expected = p_values(prompts, pattern, **options)

    wide = made_prompts(lengths, candidates=2, paired=paired, padding=padding)
    padded = torch.nn.functional.pad(pattern, (padding, 0))
    assert torch.equal(p_values(wide, padded, **options), expected)

    order = data.draw(st.permutations(range(len(lengths))))
    some = torch.tensor(order[: data.draw(st.integers(1, len(lengths)))])
    rows = torch.stack([2 * some, 2 * some + 1], dim=1).flatten() if paired else some
    result = p_values(wide.rows(rows), padded[rows], **options)
    assert torch.equal(result, expected[some])


def test_p_values_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    prompts = made_prompts([30, 22, 25], size=4, candidates=3)
    pattern = made_patterns(prompts)
    expected = p_values(prompts, pattern)
    monkeypatch.setitem(permutation._CHUNK, "cpu", 1)
    assert torch.equal(p_values(prompts, pattern), expected)


def test_prefixes_of_different_lengths_can_share_a_batch():
    short, long = made_prompts([20, 22], size=2), made_prompts([20, 22], size=6)
    both = replace(short, prefix_mask=torch.stack([short.prefix_mask[0], long.prefix_mask[1]]))
    pattern = made_patterns(both)
    result = p_values(both, pattern)
    assert torch.equal(result[:1], p_values(short, pattern)[:1])
    assert torch.equal(result[1:], p_values(long, pattern)[1:])


def test_another_seed_draws_other_sets_and_the_same_seed_the_same():
    prompts = made_prompts([30, 31])
    rows = torch.tensor([0, 1])
    first = key_sets(prompts, rows, draws=50, seed=1).keys
    assert torch.equal(first, key_sets(prompts, rows, draws=50, seed=1).keys)
    assert not torch.equal(first, key_sets(prompts, rows, draws=50, seed=2).keys)


def test_without_any_other_set_the_p_value_is_one():
    prompts = made_prompts([6], size=4, start=1, candidates=1)
    prompts = replace(prompts, prefix_mask=torch.tensor([[False] + [True] * 4 + [False]]))
    pattern = made_patterns(prompts)
    assert number_of_sets(prompts, torch.tensor([0])).tolist() == [[comb(5, 4) - 1]]
    every = replace(prompts, candidates=("<0>",), tokens=prompts.tokens)
    every = replace(every, prefix_mask=torch.tensor([[False] + [True] * 5]))
    assert number_of_sets(every, torch.tensor([0])).tolist() == [[0]]
    assert bool((p_values(every, pattern) == 1).all())


# --- through a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), "llama-gqa")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, check=False, device="cpu")


CONCEPT = Concept("Take on a cheerful mood.")
SHORT = tuple(f"{what} is {how}." for what in ("Rain", "Art", "Snow") for how in ("good", "bad"))


@pytest.fixture(scope="module")
def pairs(model):
    return build_prompts(model, CONCEPT, number=8, layout="paired", statements=SHORT)


def selection(prompts: PromptSet, index: list[int]) -> TokenSelection:
    return TokenSelection(torch.tensor(index), prompts.candidates, "given")


def test_the_scores_are_those_of_hugging_faces_own_attention(folder, model, pairs):
    reference = reference_model(folder)
    index = [0, 2, 4]
    positive = pairs.has_prefix.nonzero().flatten()
    with torch.no_grad():
        attentions = reference(
            input_ids=pairs.tokens.input_ids,
            attention_mask=pairs.tokens.attention_mask,
            output_attentions=True,
        ).attentions
    for null in ("keys", "windows", "paired"):
        result = enrich(
            model, pairs, selection(pairs, index), null=null, draws=199, progress=False, alpha=0.1
        )
        sets = dict(
            zip(
                positive.tolist(),
                real_sets(pairs, positive.tolist(), null=null, draws=199),
                strict=True,
            )
        )
        assert result.p_values.shape == (4, 3, 4, 5)
        expected = np.stack(
            [
                slow_p_values(
                    pairs,
                    pooled_by_hand(pairs, attention[:, :, -5:])
                    if null == "paired"
                    else attention[:, :, -5:],
                    lambda row, c: (row + (null == "paired"), sets[row][c]),  # noqa: B023
                )
                for attention in attentions
            ],
            axis=1,
        )
        # The two forward passes round differently, which may move a mass across the observed one.
        number = number_of_sets(pairs, positive, null=null, draws=199)
        tolerance = 2 / float(number.min())
        np.testing.assert_allclose(result.p_values, expected, rtol=0, atol=tolerance)
        assert float((result.p_values - torch.tensor(expected)).abs().mean()) < 1e-3

        hits = np.stack([expected[:, b, :, index[b]] < 0.1 for b in range(3)], axis=1)
        np.testing.assert_allclose(result.scores, hits.mean(axis=(0, 2)), atol=0.05)
        assert 0 < float(result.scores.mean()) < 1


def test_the_batch_size_and_the_order_of_prompts_do_not_change_the_p_values(model, pairs):
    chosen = selection(pairs, [4, 4, 4])
    rows = torch.tensor([6, 7, 2, 3, 0, 1])
    for null in ("keys", "windows", "paired"):
        options = {"null": null, "alpha": 0.1, "draws": 99, "progress": False}
        whole = enrich(model, pairs, chosen, **options)
        single = enrich(model, pairs, chosen, batch_size=1, **options)
        torch.testing.assert_close(single.p_values, whole.p_values, rtol=0, atol=0.021)
        some = enrich(model, pairs.rows(rows), chosen, **options)
        torch.testing.assert_close(some.p_values, whole.p_values[[3, 1, 0]], rtol=0, atol=0.021)


def test_a_prefix_outside_the_sliding_window_is_never_significant(tmp_path):
    model = load_model(
        tiny_folder(tmp_path, "gemma3", sliding_window=16), check=False, device="cpu"
    )
    prompts = build_prompts(model, CONCEPT, number=4, statements=SHORT)
    result = enrich(model, prompts, selection(prompts, [4, 4, 4]), draws=99, alpha=0.05)
    assert bool((result.p_values[:, [0, 2]] == 1).all())
    assert not bool((result.p_values[:, 1] == 1).all())


def test_attention_that_is_not_finite_is_refused_and_no_hook_stays(folder, pairs):
    broken = load_model(folder, check=False, device="cpu")
    with torch.no_grad():
        broken.original_model.model.layers[1].input_layernorm.weight.fill_(torch.nan)
    for null in ("keys", "paired"):
        with pytest.raises(ValueError, match="attention of block 1 is not finite"):
            enrich(broken, pairs, selection(pairs, [0, 0, 0]), null=null, progress=False)
    assert not any(hook.fwd_hooks for hook in broken.hook_dict.values())


def test_what_cannot_be_tested_is_refused_with_a_way_out(model, pairs):
    chosen = selection(pairs, [4, 4, 4])
    negatives = pairs.rows(~pairs.has_prefix)
    split = build_prompts(model, CONCEPT, number=4, statements=SHORT)
    for prompts, tokens, options, message in [
        (pairs, chosen, {"null": "words"}, "null must be one of keys, windows, paired"),
        (pairs, chosen, {"draws": 0}, "draws must be 1 or more"),
        (pairs, chosen, {"draws": 99}, r"alpha=0.01 cannot be reached.* p >= 0.01\b.*more draws"),
        (pairs, chosen, {"alpha": 1.5}, "alpha must be between 0 and 1"),
        (pairs, chosen, {"null": "windows", "alpha": 0.005}, "alpha=0.005 cannot be reached"),
        (pairs, selection(pairs, [4, 4]), {}, "there are 3 blocks"),
        (pairs, TokenSelection(torch.zeros(3, dtype=torch.long), ("a",), ""), {}, "selects among"),
        (negatives, chosen, {}, "no prompt has a prefix"),
        (split, chosen, {"null": "paired"}, "layout='paired'"),
    ]:
        with pytest.raises(ValueError, match=message):
            enrich(model, prompts, tokens, progress=False, **options)


def test_a_prefix_may_be_longer_than_the_paired_prompt():
    prompts = made_prompts([20], size=12, paired=True)
    assert real_sets(prompts, [0], null="paired", draws=50)[0][0][0] != tuple(range(20, 32))
    number = number_of_sets(prompts, torch.tensor([0]), null="paired", draws=10**6)
    assert number.tolist() == [[comb(18, 12) - 1, comb(19, 12) - 1]]


def test_text_without_any_attention_leaves_all_of_it_to_the_prefix():
    prompts = made_prompts([20], size=3, candidates=1, paired=True)
    for text in (0.0, 0.1):
        pattern = torch.zeros(2, 1, 1, 20)
        pattern[0, ..., 3:6], pattern[0, ..., 8] = 0.2, text
        p = p_values(prompts, pattern, null="paired", draws=999)
        assert float(p) < 0.02
    pattern = torch.zeros(2, 1, 1, 20)
    assert float(p_values(prompts, pattern, null="paired")) == 1


def test_a_prefix_with_a_gap_has_no_windows():
    prompts = made_prompts([12], size=3)
    prompts.prefix_mask[0, 4] = False
    with pytest.raises(ValueError, match="without gaps"):
        key_sets(prompts, torch.tensor([0]), null="windows")


def test_a_prefix_behind_a_candidate_token_is_refused():
    prompts = made_prompts([12], size=3, start=9)
    with pytest.raises(ValueError, match="behind its first candidate"):
        key_sets(prompts, torch.tensor([0]))


# --- scores and rankings


def made_enrichment(scores: list[int], *, null: str = "keys") -> Enrichment:
    """Ten prompts and one head, with ``scores[block]`` hits in tenths at the second candidate."""
    p = torch.full((10, len(scores), 1, 2), 0.5)
    for block, hits in enumerate(scores):
        p[:hits, block, 0, 1] = 0.001
    tokens = TokenSelection(torch.ones(len(scores), dtype=torch.long), ("a", "b"), "given")
    return Enrichment(p, torch.full((10, 2), 0.001), tokens, null, 0.01)


def test_blocks_are_ranked_by_their_share_of_hits_and_equal_ones_keep_their_order():
    result = made_enrichment([3, 7, 3, 10, 0, 7])
    torch.testing.assert_close(result.scores, torch.tensor([0.3, 0.7, 0.3, 1.0, 0.0, 0.7]))
    assert result.ranking.tolist() == [3, 1, 5, 0, 2, 4]
    assert result.top(2) == (1, 3)
    assert result.top(4) == (0, 1, 3, 5)
    assert result.bottom(2) == (2, 4)
    assert result.above(0.3) == (1, 3, 5)
    assert result.above(1.0) == ()


@given(scores=st.lists(st.integers(0, 3), min_size=2, max_size=12), data=st.data())
@settings(max_examples=30, deadline=None)
def test_top_and_bottom_together_are_all_blocks_even_with_ties(scores, data):
    result = made_enrichment(scores)
    k = data.draw(st.integers(1, len(scores) - 1))
    assert sorted(result.top(k) + result.bottom(len(scores) - k)) == list(range(len(scores)))


def test_random_blocks_depend_on_the_seed_alone():
    result = made_enrichment([0] * 8)
    draws = [result.random(3, seed=seed) for seed in range(200)]
    assert draws[0] == made_enrichment([5] * 8).random(3, seed=0)
    assert all(draw == tuple(sorted(set(draw))) and len(draw) == 3 for draw in draws)
    assert {block for draw in draws for block in draw} == set(range(8))


def test_a_p_value_equal_to_alpha_is_no_hit():
    result = made_enrichment([4])
    at_level = replace(result, p_values=torch.full((10, 1, 1, 2), 10 / 1000))
    assert float(at_level.scores) == 0


def test_other_tokens_and_levels_score_the_same_tests():
    result = made_enrichment([4, 6])
    other = replace(result.tokens, index=torch.tensor([0, 1]))
    torch.testing.assert_close(replace(result, tokens=other).scores, torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(replace(result, alpha=0.6).scores, torch.ones(2))
    with pytest.raises(ValueError, match="cannot be reached"):
        replace(result, alpha=0.001)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_number_of_blocks_that_is_not_there_is_refused(k):
    for choose in (made_enrichment([1, 2, 3]).top, made_enrichment([1, 2, 3]).random):
        with pytest.raises(ValueError, match=f"from 1 to 3, got {k}"):
            choose(k)


def test_stability_is_spearmans_correlation_and_the_shared_top():
    rows = [[9, 7, 1, 0, 5, 5], [8, 9, 2, 2, 0, 4], [0, 1, 9, 8, 2, 3]]
    runs = [made_enrichment(row, null=f"null {i}") for i, row in enumerate(rows)]
    result = rank_stability(*runs)
    expected = spearmanr(np.array(rows).T).statistic
    np.testing.assert_allclose(result.spearman, expected, atol=1e-6)
    # Tops of three: {0, 1, 4}, {0, 1, 5}, {2, 3, 5}.
    overlap = torch.tensor([[3.0, 2, 0], [2, 3, 1], [0, 1, 3]]) / 3
    torch.testing.assert_close(result.overlap, overlap)
    assert result.k == 3
    assert result.names == ("null 0", "null 1", "null 2")
    assert rank_stability(*runs, k=1).overlap[0].tolist() == [1.0, 0.0, 0.0]


def test_stability_needs_two_enrichments_of_as_many_blocks():
    for runs in ([made_enrichment([1, 2])], [made_enrichment([1, 2]), made_enrichment([1])]):
        with pytest.raises(ValueError, match="at least two enrichments of the same model"):
            rank_stability(*runs)
