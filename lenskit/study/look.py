"""A look at the model: which way to add a concept brings it nearest to what the prefix makes of it?

The best token and block depend on where a model keeps its concepts. No truth is needed to find
them: the prefixed model itself says what its next tokens should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pandas as pd

from lenskit._arguments import positive_numbers, whole
from lenskit._display import Displayed, count, quoted
from lenskit.capture import Capture, capture
from lenskit.concepts import Concept, statement_prompt
from lenskit.generation import generate
from lenskit.labels import next_token_divergence
from lenskit.prompts import build_prompts
from lenskit.recipes import INCREMENTS, LOOK, Recipe, find_recipe
from lenskit.study.divergence import Unsteered, divergence, followed, log_probs_along
from lenskit.vectors import ConceptVectors, fit_vectors, in_blocks, increments

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

COEFFICIENTS = (0.5, 1.0, 1.5, 2.0)
MAX_NEW_TOKENS = 12
_TOKENS = ("each", "attention")
_MOST_BLOCKS = 12
_TRIED = 4


@dataclass(frozen=True, repr=False)
class Look(Displayed):
    """What each way to add a concept leaves of the divergence from the prefixed model.

    ``recipe``: with the token, blocks and coefficient that leave least. ``table``: a row for each
    ``token``, ``blocks`` and ``coefficient``, with ``divergence`` in nats a token (mean over
    concepts) and ``left``, its share of ``unsteered``: what it is when nothing is added.
    ``concepts``: whose prompts were looked at.
    """

    recipe: Recipe
    table: pd.DataFrame = field(repr=False)
    unsteered: float
    concepts: tuple[str, ...]

    @property
    def why(self) -> str:
        """The choice in a sentence, with the two next best ways."""
        said = self._said
        return f"{said[0]} of the divergence from the prefixed model" + (
            f"; next best: {', '.join(said[1:3])}" if said[1:] else ""
        )

    @property
    def _said(self) -> list[str]:
        ways = self.table.sort_values("left", kind="stable").drop_duplicates(["token", "blocks"])
        return [f"{_way(row.token, row.blocks)} leaves {row.left:.0%}" for row in ways.itertuples()]

    def _headline(self) -> str:
        return f"Look at {count(len(self.concepts), 'concept')}: {self._said[0]}"

    def _rows(self) -> dict[str, object]:
        recipe = self.recipe
        shown: dict[str, object] = {
            "token": recipe.token,
            "blocks": recipe.blocks,
            "coefficient": recipe.coefficient,
            "unsteered": f"{self.unsteered:.3g} nats a token from the prefixed model",
            "concepts": quoted(self.concepts),
        }
        best = self.table.groupby(["token", "blocks"], sort=False)["left"].min()
        for token in dict.fromkeys(self.table["token"]):
            own = ", ".join(f"{blocks}: {left:.2f}" for blocks, left in best[token].items())
            shown[f"left, {token}"] = own
        return shown


def look(
    model: TransformerBridge,
    concepts: Concept | Capture | Iterable[Concept | Capture],
    *,
    recipe: Recipe | str = "lenskit",
    coefficients: Sequence[float] = COEFFICIENTS,
    prompts: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
) -> Look:
    """Settle a recipe: try its ways to add a concept, and take what comes nearest to the prefix.

    ``concepts``: one or a few, or captures of their prompts; several settle one recipe for all.
    Ways are each closing token's own vector in one block, the same in all blocks by ``increments``,
    and the attention-guided token's vector, added to all tokens in one block; of a recipe that
    names its token or its blocks only those. Each is tried at every coefficient, in units of the
    displacement. What is measured is KL(prefixed ‖ steered) of the next token along the answers
    that the model writes with the prefix, about those statements of the prompts where the prefix
    changes its next tokens most. The smallest mean over concepts is chosen.

    Nothing in it knows the truth: no judge, and no answer to a test question. A large model has at
    most 12 blocks tried, evenly spaced. Raises ValueError for a recipe whose unit is not the
    displacement, and for prompts without statements or prefix.

    >>> found = lk.look(model, capture, coefficients=(1.0,), max_new_tokens=3)
    >>> found.recipe.settled, len(found.table) >= model.cfg.n_layers
    (True, True)
    >>> own = lk.fit_vectors(capture, recipe=found.recipe, model=model, progress=False)
    >>> with lk.steer(model, own, recipe=found.recipe):
    ...     answer = lk.generate(model, concept.questions[0], max_new_tokens=8)
    """
    known = find_recipe(recipe)
    if known.unit != "displacement":
        raise ValueError(
            f"recipe {known.name!r} has coefficients in units of {known.unit}, and a look compares "
            "those of the displacement; give recipe='lenskit'"
        )
    tried = positive_numbers("coefficients", coefficients)
    whole("prompts", prompts, 8)
    whole("max_new_tokens", max_new_tokens, 1)
    given = [concepts] if isinstance(concepts, Concept | Capture) else list(_members(concepts))
    if not given:
        raise ValueError("concepts is empty; give at least one")
    captures = [
        one
        if isinstance(one, Capture)
        else capture(
            model,
            build_prompts(model, one, number=prompts, seed=seed),
            batch_size=batch_size,
            progress=False,
        )
        for one in given
    ]
    tables = [
        looked_at(
            model,
            one,
            known,
            coefficients=tried,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )
        for one in captures
    ]
    return settled(known, tables, [one.prompts.concept.name for one in captures])


def looked_at(
    model: TransformerBridge,
    captured: Capture,
    recipe: Recipe,
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """The divergences of one concept: a row for each token, blocks and coefficient of ``look``.

    And one without a token, of coefficient 0, for the unsteered model.
    """
    base = _prefixed(model, captured, max_new_tokens, batch_size)
    ways = dict(_ways(model, captured, recipe, seed))
    keys = [("", "", 0.0), *((*way, each) for way in ways for each in coefficients)]
    left = divergence(
        model,
        base,
        [ways.get((token, blocks), next(iter(ways.values()))) for token, blocks, _ in keys],
        [coefficient for *_, coefficient in keys],
        relative=True,
        batch_size=batch_size,
    )
    table = pd.DataFrame(keys, columns=["token", "blocks", "coefficient"])
    return table.assign(divergence=left.tolist())


def settled(recipe: Recipe, tables: Sequence[pd.DataFrame], names: Sequence[str]) -> Look:
    """The recipe with what leaves least, the mean over the concepts of these tables."""
    by = ["token", "blocks", "coefficient"]
    # What overflows is not near, and so is not for any concept.
    every = pd.concat(tables).fillna({"divergence": float("inf")})
    mean = every.groupby(by, sort=False)["divergence"].mean().reset_index()
    unsteered = float(mean.loc[mean["token"] == "", "divergence"].iloc[0])
    table = mean[mean["token"] != ""].reset_index(drop=True)
    table["left"] = table["divergence"] / unsteered
    best = table.loc[table["divergence"].idxmin()]
    found = replace(
        recipe,
        token=str(best["token"]),
        blocks=str(best["blocks"]),
        coefficient=float(best["coefficient"]),
    )
    return Look(found, table, unsteered, tuple(names))


def _members(concepts: Iterable[Concept | Capture]) -> Iterable[Concept | Capture]:
    """What is looked at; a class of concepts stands for its members."""
    return concepts.values() if isinstance(concepts, Mapping) else concepts


def _ways(
    model: TransformerBridge, captured: Capture, recipe: Recipe, seed: int
) -> Iterator[tuple[tuple[str, str], ConceptVectors]]:
    """Every way that the recipe leaves open, by token and blocks."""
    layers = captured.layers
    most = min(layers, _MOST_BLOCKS)
    some = sorted({round(i * (layers - 1) / max(1, most - 1)) for i in range(most)})
    # Increments are of closing tokens.
    open_ones = _TOKENS[:1] if recipe.blocks == INCREMENTS else _TOKENS
    for token in open_ones if recipe.token == LOOK else (recipe.token,):
        everywhere = replace(recipe, token=token, blocks="all")
        vectors = fit_vectors(captured, recipe=everywhere, model=model, seed=seed, progress=False)
        if recipe.blocks != LOOK:
            blocks = replace(recipe, token=token).blocks_of(layers)
            if recipe.blocks == INCREMENTS:
                vectors = increments(model, captured, vectors)
            yield (token, recipe.blocks), in_blocks(vectors, blocks or range(layers))
            continue
        if vectors.closing:
            yield (token, INCREMENTS), increments(model, captured, vectors)
        for block in some:
            yield (token, str(block)), in_blocks(vectors, [block])


def _prefixed(
    model: TransformerBridge, captured: Capture, max_new_tokens: int, batch_size: int
) -> Unsteered:
    """Unprefixed prompts followed by the prefixed model's answers, and what it expects along them.

    About the statements where the prefix changes the next token most.
    """
    prompts = captured.prompts
    moved = next_token_divergence(model, prompts, batch_size=batch_size)
    order = moved.argsort(descending=True, stable=True)[:_TRIED].tolist()
    about = [prompts.statements[row] for row in order if moved[row] > 0]
    if not about:
        raise ValueError(
            "the prefix changes no prompt's next token, so there is nothing to come to"
        )
    prefixed = [statement_prompt(one, prompts.concept.prefix) for one in about]
    answers = generate(model, prefixed, max_new_tokens=max_new_tokens, batch_size=batch_size)
    told = followed(model, prefixed, answers)
    log_probs = log_probs_along(model, told, batch_size, read=lambda row, own: own)
    bare = followed(model, [statement_prompt(one) for one in about], answers)
    return replace(bare, log_probs=tuple(log_probs))


def _way(token: str, blocks: str) -> str:
    what = {"each": "each closing token's own vector", "attention": "the token by attention"}
    where = "in all blocks, by increments" if blocks == INCREMENTS else f"in block {blocks}"
    return f"{what.get(token, f'token {token}')} {where}"
