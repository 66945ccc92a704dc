"""Which blocks carry a concept: permutation tests of the attention to its prefix (AGS).

AGS counts, for each block, how often attention to the prefix is significant, but does not say how
its p-values are drawn. The three nulls here are a reconstruction; ``rank_stability`` shows how far
the order of the blocks depends on the choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed, by_block, quoted, spread
from lenskit.capture import for_each_pattern
from lenskit.enrichment.permutation import (
    KeySets,
    Null,
    key_sets,
    number_of_sets,
    permutation_p_values,
    pooled,
    prefix_mass,
    prefix_weights,
    text_keys,
)
from lenskit.prompts import PromptSet
from lenskit.selector import TokenSelection

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class Enrichment(Displayed):
    """How often attention to the prefix is significant, block by block.

    ``p_values`` are those of the prompts with a prefix, in their order, for every candidate
    token; ``smallest`` is the least value that each test can give, 1 / (sets + 1). ``tokens``
    picks the candidate of each block. The scores follow from these and ``alpha``, so
    ``dataclasses.replace`` scores the same tests by another token or level.

    Raises ``ValueError`` when ``alpha`` cannot be reached by every test at the selected tokens,
    and for a selection among another number of candidates or blocks.
    """

    p_values: Float[Tensor, "prompt layer head candidate"]
    smallest: Float[Tensor, "prompt candidate"]
    tokens: TokenSelection
    null: str
    alpha: float

    def __post_init__(self) -> None:
        _, layers, _, candidates = self.p_values.shape
        if (len(self.tokens.index), len(self.tokens.candidates)) != (layers, candidates):
            raise ValueError(
                f"tokens selects among {len(self.tokens.candidates)} candidates for "
                f"{len(self.tokens.index)} blocks; the tests are of {candidates} candidates and "
                f"{layers} blocks"
            )
        _check_alpha(self.alpha, self.smallest, self.tokens, self.null)

    def _headline(self) -> str:
        return f"Enrichment of {len(self.tokens.index)} blocks"

    def _rows(self) -> dict[str, object]:
        scores, best = self.scores, self.ranking[:5].tolist()
        return super()._rows() | {
            "scores": spread(scores.tolist()),
            "most enriched": ", ".join(f"{block} ({scores[block]:.3g})" for block in best),
            "tokens": by_block(self.tokens.tokens),
        }

    @property
    def hits(self) -> Bool[Tensor, "prompt layer head"]:
        """Where p < ``alpha`` at the block's selected token."""
        return self.tokens.take(self.p_values.movedim(-1, 2)) < self.alpha

    @property
    def scores(self) -> Float[Tensor, " layer"]:
        """The enrichment score of each block: the share of hits over prompts and heads (AGS)."""
        hits = self.hits
        return hits.sum(dim=(0, 2)) / (hits.shape[0] * hits.shape[2])

    @property
    def ranking(self) -> Int[Tensor, " layer"]:
        """The blocks by score, best first; of equal blocks the earlier one comes first."""
        return self.scores.argsort(descending=True, stable=True)

    def top(self, k: int) -> tuple[int, ...]:
        """The first ``k`` blocks of the ranking, as sorted indices."""
        return _sorted(self.ranking[: self._number_of_blocks(k)])

    def bottom(self, k: int) -> tuple[int, ...]:
        """The last ``k`` blocks of the ranking: never in ``top(j)`` while j + k <= blocks."""
        return _sorted(self.ranking[-self._number_of_blocks(k) :])

    def above(self, threshold: float) -> tuple[int, ...]:
        """The blocks whose score is greater than ``threshold``; there may be none."""
        return _sorted((self.scores > threshold).nonzero().flatten())

    def random(self, k: int, seed: int = 0) -> tuple[int, ...]:
        """``k`` blocks drawn without regard to their scores, as a control."""
        blocks = range(self.p_values.shape[1])
        return tuple(sorted(random.Random(seed).sample(blocks, self._number_of_blocks(k))))

    def _number_of_blocks(self, k: int) -> int:
        return whole("k, a number of blocks,", k, 1, self.p_values.shape[1])


def enrich(
    model: TransformerBridge,
    prompts: PromptSet,
    tokens: TokenSelection,
    *,
    null: Null = "keys",
    draws: int = 999,
    alpha: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Enrichment:
    """Test, for each prefixed prompt, block, head and candidate token, attention to the prefix.

    The statistic is the attention mass on the P tokens of the prefix. It is compared, one-sided,
    with the masses on B other sets of P keys: p = (b + 1) / (B + 1), where b of them reach it
    (ties included). The sets, by ``null``:

    - ``"keys"``: ``draws`` sets drawn without replacement from the prompt's keys;
    - ``"windows"``: all other runs of P adjacent keys. B is the number of keys less P, often 20
      to 60, and p is never below 1 / (B + 1);
    - ``"paired"``: as ``"keys"``, but the text's keys are those of the prompt with the same
      statement and no prefix, at the same block, head and candidate (prompts built with
      ``layout="paired"``). Their mass is scaled to what the text has beside the prefix, since
      the first token takes another share of each prompt.

    Where all sets are at most ``draws``, each is taken once, and p is exact. Keys are those that
    the candidate token can see: not padding, not later tokens, and not the first token of the
    prompt, BOS or whatever stands there, since it soaks up attention (unless the prefix itself
    begins there). Keys outside a sliding window count too, with mass 0.

    What each null assumes, and its share of hits without any signal (30 tokens of text and 11 of
    prefix, normal scores; ``python -m benchmarks.false_positives``):

    - ``"keys"``: the keys are exchangeable. Then 0.011 at p < 0.01; but 0.08 to 0.22 where early
      keys are favoured, for the prefix stands early, and 0 where late ones are.
    - ``"windows"``: runs of keys are, wherever they stand. Adjacent ones overlap, so that there
      are few in fact: 0.03 at p < 0.05, up to 0.05 where early keys are favoured, 0 where late.
    - ``"paired"``: keys are exchangeable with those of the prompt without the prefix, whatever
      its first token takes. Then 0.011 at p < 0.01; 0.08 to 0.28 where early keys are favoured, 0
      where late ones are.

    Sets depend on ``seed`` and on the prompt's own tokens only. One prompt's sets serve all of
    its blocks, heads and candidates: each test is valid by itself, but they are not independent.

    ``alpha``: the level of a hit; ``None`` is 0.01 as in AGS, and 0.05 for ``"windows"``.

    Raises ``ValueError`` when a test cannot reach ``alpha``, when prompts lack a prefix or a
    pair, or when attention is not finite.

    >>> tokens = lk.select_tokens(capture)
    >>> enrichment = lk.enrich(model, prompts, tokens, draws=199, progress=False)
    >>> with lk.steer(model, vectors, coefficient=0.04, blocks=enrichment.top(4)):
    ...     answer = lk.generate(model, concept.questions[0], max_new_tokens=8)
    """
    if null not in get_args(Null):
        raise ValueError(f"null must be one of {', '.join(get_args(Null))}; got {null!r}")
    draws, seed = whole("draws", draws, 1), whole("seed", seed, 0)
    batch_size = whole("batch_size", batch_size, 1)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    tokens.check(prompts.candidates, layers)
    alpha = (0.05 if null == "windows" else 0.01) if alpha is None else alpha
    positive = prompts.has_prefix.nonzero().flatten()
    if not len(positive):
        raise ValueError("no prompt has a prefix, so there is no attention to it to test")
    smallest = 1 / (number_of_sets(prompts, positive, null=null, draws=draws) + 1)
    _check_alpha(alpha, smallest, tokens, null)

    candidates = len(prompts.candidates)
    prefix = prompts.prefix_mask[positive]
    observed = torch.empty(len(positive), layers, heads, candidates)
    p_values = torch.empty_like(observed)

    # A batch comes once for every block, and its sets are the same.
    @lru_cache(maxsize=1)
    def sets_of(rows: tuple[int, ...], device: torch.device) -> KeySets:
        chosen = positive[list(rows)]
        return key_sets(prompts, chosen, null=null, draws=draws, seed=seed).to(device)

    def observe(layer: int, rows: Tensor, pattern: Tensor) -> None:
        mask = prefix[rows, -pattern.shape[-1] :].to(pattern.device)
        observed[rows, layer] = prefix_mass(pattern, mask).cpu()

    def observe_pair(layer: int, rows: Tensor, pattern: Tensor) -> None:
        keys, mask = text[rows, -pattern.shape[-1] :], prefix[rows, -pattern.shape[-1] :]
        texts[rows, layer] = prefix_mass(pattern, keys.to(pattern.device)).cpu()
        weights[rows, layer] = prefix_weights(pattern, mask.to(pattern.device), places).cpu()

    def test(layer: int, rows: Tensor, pattern: Tensor) -> None:
        if null == "paired":
            keys = other_text[rows, -pattern.shape[-1] :].to(pattern.device)
            known = (part[rows, layer].to(pattern.device) for part in (texts, weights))
            mass_of_text, of_prefix = known
            pattern = pooled(pattern, keys, mass_of_text, of_prefix)
        sets = sets_of(tuple(rows.tolist()), pattern.device)
        mass = observed[rows, layer].to(pattern.device)
        p_values[rows, layer] = permutation_p_values(pattern, sets, mass).cpu()

    def read(of: Tensor, *steps: Callable[[int, Tensor, Tensor], None]) -> None:
        def visit(layer: int, rows: Tensor, pattern: Tensor, _: Tensor) -> None:
            # A comparison with nan is false, which would count as significant.
            if not bool(pattern.isfinite().all()):
                raise ValueError(
                    f"attention of block {layer} is not finite; load the model in another dtype "
                    "(dtype='float32' or 'bfloat16')"
                )
            for step in steps:
                step(layer, rows, pattern)

        some = prompts.tokens.rows(of)
        for_each_pattern(model, some, candidates, visit, batch_size=batch_size, progress=progress)

    if null == "paired":
        places = int(prefix.sum(dim=1).max())
        texts, weights = torch.empty_like(observed), observed.new_empty(*observed.shape, places)
        text, other_text = (text_keys(prompts, positive, paired=each) for each in (False, True))
        read(positive, observe, observe_pair)
        read(prompts.pair[positive], test)
    else:
        read(positive, observe, test)
    return Enrichment(p_values, smallest, tokens, null, alpha)


@dataclass(frozen=True, repr=False)
class RankStability(Displayed):
    """How alike several enrichments order the blocks, each compared with each.

    ``spearman``: rank correlation of the scores (ties share their mean rank; nan where all
    blocks of one score alike). ``overlap``: the share of blocks that both have in their top
    ``k``; two random orders would share k / blocks.
    """

    names: tuple[str, ...]
    spearman: Float[Tensor, "run run"]
    overlap: Float[Tensor, "run run"]
    k: int

    def _rows(self) -> dict[str, object]:
        pairs = torch.triu_indices(len(self.names), len(self.names), 1).unbind()
        return {
            "names": quoted(self.names),
            "spearman": spread(self.spearman[pairs].tolist()),
            f"overlap of the top {self.k}": spread(self.overlap[pairs].tolist()),
        }


def rank_stability(*enrichments: Enrichment, k: int | None = None) -> RankStability:
    """Compare the rankings of two or more enrichments of the same model's blocks.

    ``k``: the size of the top that is compared, half of the blocks by default. Names are the
    nulls. Raises ``ValueError`` for fewer than two, or for different numbers of blocks.

    >>> tokens = lk.select_tokens(capture)
    >>> one = lk.enrich(model, prompts, tokens, draws=199, progress=False)
    >>> other = lk.enrich(model, prompts, tokens, null="windows", progress=False)
    >>> lk.rank_stability(one, other, k=2).overlap.shape
    torch.Size([2, 2])
    """
    blocks = {len(enrichment.scores) for enrichment in enrichments}
    if len(enrichments) < 2 or len(blocks) > 1:
        raise ValueError(
            "rank_stability compares at least two enrichments of the same model; got "
            f"{len(enrichments)}, with {sorted(blocks)} blocks"
        )
    k = max(1, blocks.pop() // 2) if k is None else k
    ranks = torch.stack(
        [torch.from_numpy(rankdata(enrichment.scores.numpy())) for enrichment in enrichments]
    )
    tops = [set(enrichment.top(k)) for enrichment in enrichments]
    overlap = torch.tensor([[len(a & b) / k for a in tops] for b in tops])
    names = tuple(enrichment.null for enrichment in enrichments)
    return RankStability(names, ranks.corrcoef().float(), overlap, k)


def _sorted(blocks: Int[Tensor, " block"]) -> tuple[int, ...]:
    return tuple(sorted(blocks.tolist()))


def _check_alpha(
    alpha: float, smallest: Float[Tensor, "prompt candidate"], tokens: TokenSelection, null: str
) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    selected = smallest[:, tokens.index.unique()]
    if bool((selected >= alpha).any()):
        raise ValueError(
            f"alpha={alpha} cannot be reached with null={null!r}: the prompt with the fewest sets "
            f"of keys gives p >= {float(selected.max()):.4g}. Choose alpha above that"
            + ("." if null == "windows" else ", or more draws.")
        )
