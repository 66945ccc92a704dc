"""The settings of a whole run under one name, and the only place where defaults are kept.

``fit_vectors``, ``variants``, ``run_study``, ``steer`` and the command line take theirs from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Literal

from lenskit._display import Displayed

__all__ = ["DEFAULT", "Recipe", "find_recipe", "recipes"]


@dataclass(frozen=True)
class Recipe(Displayed):
    """How concept vectors are made and applied; every argument that is given overrides it.

    ``token``: "attention" (AGS, Eq. 3), an offset such as "-1", or "each": every closing token its
    own vector, which is added there alone. ``labels``: "soft" (Eq. 4), "hard", "divergence" (by how
    much the prefix changes the next token). ``learner``: a name in ``LEARNERS``. ``unit_rows``:
    whose rows are L2-normalised, "all" learners' or those of "rfm" alone. ``scale_validation``:
    whether RFM's scaled variant scales its validation rows too. ``separator``: whether the white
    space after the prefix counts as part of it. ``blocks``: "all", "from1" (without the first),
    "top4", numbers such as "4,5", or "increments": all, each with what those before it do not carry
    yet (``lk.increments``). ``start``: the first steered position. ``relative``: coefficients are
    in a unit that depends on the block, and ``unit`` which: the block's mean residual norm, or how
    far the prefix itself moves the stream ("displacement"). ``coefficients``: those a study tries;
    none where they depend on the model. ``coefficient``: the one for all concepts, where there is.

    Where ``token`` or ``blocks`` is "look" they depend on the model: ``lk.look`` settles them.
    ``why``: where the settings come from.

    >>> import lenskit as lk
    >>> lk.recipes["paper"].learner
    'rfm'
    """

    name: str
    token: str
    labels: str
    learner: str
    unit_rows: Literal["all", "rfm"]
    scale_validation: bool
    separator: bool
    blocks: str
    start: int
    relative: bool
    coefficients: tuple[float, ...]
    why: str = field(repr=False, compare=False)
    unit: Literal["resid_norm", "displacement"] = "resid_norm"
    coefficient: float | None = None

    @property
    def settled(self) -> bool:
        """Whether token and blocks are known, and do not wait for a look at the model."""
        return LOOK not in (self.token, self.blocks)

    def require_settled(self) -> None:
        """Raise ValueError, which says what would work, unless token and blocks are known."""
        if not self.settled:
            raise ValueError(
                f"recipe {self.name!r} chooses token and blocks by a look at the model; settle it "
                "first: recipe=lk.look(model, concept).recipe"
            )

    def blocks_of(self, number: int) -> tuple[int, ...] | None:
        """The steered blocks of a model of so many; ``None`` for all.

        Raises ValueError for blocks that a test or a look at the model chooses.
        """
        if self.blocks in ("all", INCREMENTS):
            return None
        if self.blocks.startswith("from"):
            return tuple(range(int(self.blocks.removeprefix("from")), number))
        if not self.blocks[0].isdecimal():
            self.require_settled()
            raise ValueError(
                f"recipe {self.name!r} steers the blocks {self.blocks!r}, which an enrichment test "
                "chooses; give their numbers: blocks=lk.enrich(model, prompts, tokens).top(4)"
            )
        return tuple(int(block) for block in self.blocks.split(","))

    def __str__(self) -> str:
        """The settings, one a line."""
        shown = [f"recipe {self.name!r}: {self.why}"]
        for each in fields(self)[1:]:
            if each.name == "why":
                continue
            value = getattr(self, each.name)
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            shown.append(f"  {each.name:<16} {text or 'depend on the model; give them'}")
        return "\n".join(shown)


# A token or blocks that a look at the model is to choose.
LOOK = "look"
# Blocks each of which adds what the earlier ones do not carry yet.
INCREMENTS = "increments"


class _Recipes(Mapping[str, Recipe]):
    """The named recipes.

    ``"default"``: what the comparison on 105 concepts recommends (``data/results``) of what needs
    no look at the model. The attention-guided token, since which fixed one is good differs between
    models; soft labels, which help where attention follows activity and change little elsewhere;
    the covariance with the labels, which does as well as the best learner and costs one matrix
    product; coefficients are relative, since residual norms differ between blocks and models.

    ``"paper"``: attention-guided steering as published (arXiv 2602.00333): Eq. 3, Eq. 4, RFM, all
    blocks but the first, all tokens, absolute coefficients, which are to be given since they
    depend on the model. Where the paper's text leaves it open it follows the authors' code, faults
    included: the span of the prefix runs up to the first token of the statement prompt, so the
    separating space counts as prefix (about 3 % of the mass); only RFM sees L2-normalised rows,
    other learners raw ones; RFM's scaled variant scales the validation rows too, on which the
    choice of the vector depends. Other faults of that code are not followed: M = I is never a
    candidate, each block's sign is by its own labels, ``resid_post`` is read before the final
    norm, every method gets the same coefficients, attention stays in the model's precision.

    ``"lenskit"``: looks first and then chooses (``lk.look``). The concept sits in several closing
    tokens of the template, each of which holds its part: so each has its own vector, as long as the
    prefix itself moves that token, added there alone, and no other token is touched. In which block
    depends on the model, and so does whether one vector for all tokens in all blocks is better;
    that which brings the unprefixed model nearest to the prefixed one is taken. Labels say by how
    much the prefix changes each prompt's next token, so that prompts count in which the concept
    shows. Nothing of it knows the truth: neither a judge nor an answer to a test question is asked.
    It cannot work where prompts share no closing tokens, or where the prefix changes nothing.
    """

    def __init__(self, *known: Recipe) -> None:
        self._known = {recipe.name: recipe for recipe in known}

    def __getitem__(self, name: str) -> Recipe:
        if name not in self._known:
            close = get_close_matches(str(name), self._known, 1)
            raise KeyError(
                f"recipe {name!r} is not one of {', '.join(self._known)}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return "\n".join(map(str, self.values()))


recipes: Mapping[str, Recipe] = _Recipes(
    Recipe(
        name="default",
        token="attention",
        labels="soft",
        learner="covariance",
        unit_rows="all",
        scale_validation=False,
        separator=False,
        blocks="all",
        start=0,
        relative=True,
        coefficients=(0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13),
        why="what lenskit's own comparison of tokens, labels and learners recommends",
    ),
    Recipe(
        name="paper",
        token="attention",
        labels="soft",
        learner="rfm",
        unit_rows="rfm",
        scale_validation=True,
        separator=True,
        blocks="from1",
        start=0,
        relative=False,
        coefficients=(),
        why="attention-guided steering as its authors publish and run it (arXiv 2602.00333)",
    ),
    Recipe(
        name="lenskit",
        token=LOOK,
        labels="divergence",
        learner="covariance",
        unit_rows="rfm",
        scale_validation=False,
        separator=False,
        blocks=LOOK,
        start=0,
        relative=True,
        coefficients=(0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
        why="looks where the model keeps a concept, and adds what the prefix would, there alone",
        unit="displacement",
        coefficient=1.0,
    ),
)
DEFAULT = recipes["default"]
CLOSING = replace(recipes["lenskit"], token="each", blocks=INCREMENTS)
"""The recipe "lenskit" without a look: each closing token its own vector, in all blocks."""


def find_recipe(recipe: Recipe | str | None) -> Recipe:
    """A recipe from its name, itself, or ``None`` for the default. Raises KeyError for others."""
    if recipe is None:
        return DEFAULT
    return recipe if isinstance(recipe, Recipe) else recipes[recipe]
