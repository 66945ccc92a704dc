"""The ways of a study: variants, and its settings brought into one form before anything runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from numbers import Real
from typing import Any

from lenskit._display import Displayed
from lenskit.concepts import BLOCKS, TOKENS
from lenskit.labels import LABELS
from lenskit.recipes import DEFAULT, INCREMENTS, LOOK, Recipe, find_recipe
from lenskit.vectors import learners_of

__all__ = ["COEFFICIENTS", "CONTROLS", "Variant", "settings_of", "variants", "warn_of_silence"]

COEFFICIENTS = DEFAULT.coefficients
SILENT = 0.05
CONTROLS = ("unsteered", "prompted", "random vector", "shuffled labels")
# A stricter shuffle, which tells nothing of the prefix either; it has to be asked for.
BALANCED = "balanced shuffle"


@dataclass(frozen=True)
class Variant(Displayed):
    """One way to make a concept vector and to apply it.

    ``token``: "attention" (Eq. 3), a fixed offset such as "-1", or "each": every closing token its
    own vector, which is added there alone. ``labels``: "soft" (Eq. 4), "hard", "gating",
    "gating or hard", or "true activity" (of the embedded grammar). ``learner``: a key of the
    study's learners. ``blocks``: "all", "from1" (without the first), "top4", "bottom4", "random4"
    by enrichment, block numbers such as "4,5,6", or "increments": all, each with what those before
    it do not carry yet (of a recipe whose unit is the displacement). A token or blocks of "look"
    are chosen by a look at the model, once for a study (``lk.look``). ``control``: empty, one of
    ``CONTROLS``, or "balanced shuffle" (as many high labels with the prefix as without). Raises
    ``ValueError`` for anything else.

    >>> Variant(token="-1").labels
    'soft'
    """

    token: str = DEFAULT.token
    labels: str = DEFAULT.labels
    learner: str = DEFAULT.learner
    blocks: str = DEFAULT.blocks
    control: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", _token(self.token))
        object.__setattr__(self, "blocks", _blocks(self.blocks))
        _among("labels", self.labels, LABELS)
        if not isinstance(self.learner, str) or not self.learner:
            raise ValueError(f"learner must be the name of a learner, got {self.learner!r}")
        if self.control:
            _among("control", self.control, (*CONTROLS, BALANCED))

    @property
    def settled(self) -> bool:
        """Whether token and blocks are known, and do not wait for a look at the model."""
        return LOOK not in (self.token, self.blocks)

    @property
    def still(self) -> bool:
        """Whether it is a control without any vectors."""
        return self.control in ("unsteered", "prompted")


def variants(
    recipe: Recipe | str | None = None,
    *,
    tokens: Iterable[str | int] | str | int | None = None,
    labels: Iterable[str] | str | None = None,
    learners: Iterable[str] | str | None = None,
    blocks: Iterable[str | Sequence[int]] | str | None = None,
    controls: Iterable[str] | str = CONTROLS,
) -> tuple[Variant, ...]:
    """Every combination, and the controls of the first one.

    One choice may stand for a list of one; what is not given is the recipe's (``lk.recipes``).
    Raises ``ValueError`` for a choice that is not known.

    >>> [v.learner for v in variants(learners=("ridge", "rfm"), controls=())]
    ['ridge', 'rfm']
    """
    known = find_recipe(recipe)
    choices = (
        _choices("tokens", tokens, known.token),
        _choices("labels", labels, known.labels),
        _choices("learners", learners, known.learner),
        _choices("blocks", blocks, known.blocks),
    )
    combined = list(dict.fromkeys(Variant(*choice) for choice in product(*choices)))
    own = dict.fromkeys(_choices("controls", controls, None))
    return (*combined, *(replace(combined[0], control=_control(control)) for control in own))


def variant_of(recipe: Recipe | str) -> Variant:
    """The one way that a recipe names, without controls."""
    return variants(recipe, controls=())[0]


def settings_of(variants: Iterable[Variant] | Variant | None, options: Mapping[str, Any]) -> tuple:
    """Variants and options of a study as they are run: the recipe's where they are not given.

    Raises ``ValueError`` for variants or coefficients that are none, not finite, equal, or an
    iterator, which only the first concept would see; for a learner that is not known; and for a
    recipe whose coefficients have to be given.
    """
    made = dict(options)
    recipe = made["recipe"] = find_recipe(made.get("recipe"))
    ways = _listed("variants", _ways(variants, recipe))
    if not all(isinstance(way, Variant) for way in ways):
        raise TypeError("variants must be those of variants(), or a list of Variant")
    made["learners"] = made.get("learners") or learners_of(recipe)
    for way in ways:
        _among("learner", way.learner, made["learners"])
        if {LOOK, INCREMENTS} & {way.token, way.blocks} and recipe.unit != "displacement":
            raise ValueError(
                f"token {way.token!r} in blocks {way.blocks!r} needs a recipe whose unit is the "
                f"displacement, and recipe {recipe.name!r} has {recipe.unit}; give recipe='lenskit'"
            )
    if made.get("relative") is None:
        made["relative"] = recipe.relative
    made["coefficients"] = _coefficients(made.get("coefficients"), recipe)
    return ways, made


def warn_of_silence(rows: Iterable[Mapping[str, Any]]) -> None:
    """Warn once where even the real prefix in the prompt scores near 0: rows of a study."""
    scores = [row["score"] for row in rows if row["control"] == "prompted"]
    if scores and (mean := sum(scores) / len(scores)) <= SILENT:
        warnings.warn(
            f"the prompted control scores {mean:.2f} over {len(scores)} answers: with the prefix "
            "in the prompt the judge sees the concept hardly ever, so scores of steering say "
            "little; does the model follow the prefix, and does the judge know what shows it?",
            stacklevel=3,
        )


def _ways(variants: Iterable[Variant] | Variant | None, recipe: Recipe) -> Iterable[Variant]:
    if variants is None:
        return globals()["variants"](recipe)
    return [variants] if isinstance(variants, Variant) else variants


def _coefficients(given: Any, recipe: Recipe) -> tuple[float, ...]:
    if given is None:
        if not recipe.coefficients:
            raise ValueError(
                f"coefficients of recipe {recipe.name!r} are absolute and depend on the model; "
                "give some, such as coefficients=(0.5, 1, 2, 4)"
            )
        return recipe.coefficients
    given = [given] if isinstance(given, Real) else given
    numbers = tuple(float(number) for number in _listed("coefficients", given))
    if not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"coefficients must be finite and different numbers, got {numbers}")
    return numbers


def _listed(name: str, given: Iterable) -> tuple:
    if isinstance(given, Iterator):
        raise ValueError(f"{name} is {type(given).__name__}, read once; give tuple({name})")
    if not (found := tuple(given)):
        raise ValueError(f"{name} is empty; give at least one")
    return found


def _choices(name: str, given: Any, default: Any) -> tuple:
    if given is None:
        return (default,)
    if isinstance(given, str | Real):
        return (given,)
    found = tuple(given)
    if not found and name != "controls":
        raise ValueError("tokens, labels, learners and blocks must each name at least one choice")
    return found


def _token(token: Any) -> str:
    text = str(token)
    if isinstance(token, bool) or not TOKENS.fullmatch(text):
        raise ValueError(
            f"token must be 'attention', 'each', 'look', or an offset such as '-1'; got {token!r}"
        )
    return text


def _blocks(blocks: Any) -> str:
    text = blocks if isinstance(blocks, str) else ""
    if not text and isinstance(blocks, Iterable):
        text = ",".join(map(str, blocks))
    if not BLOCKS.fullmatch(text) or len(set(text.split(","))) < len(text.split(",")):
        raise ValueError(
            "blocks must be 'all', 'from1', 'increments', 'look', 'top4', 'bottom4', 'random4' or "
            f"numbers such as '4,5,6'; got {blocks!r}"
        )
    return text


def _control(control: Any) -> str:
    _among("control", control, (*CONTROLS, BALANCED))
    return control


def _among(name: str, given: Any, known: Iterable[str]) -> None:
    names = list(known)
    if given not in names:
        close = get_close_matches(str(given), names, 1)
        raise ValueError(
            f"{name} {given!r} is not one of {', '.join(names)}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
