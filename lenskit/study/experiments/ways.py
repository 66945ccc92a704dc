"""Ways to steer that an experiment compares, and the controls beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lenskit._display import Displayed
from lenskit.intervention import Positions
from lenskit.recipes import Recipe
from lenskit.study.experiments.bench import Bench
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors, fit_vectors, in_blocks

Make = Callable[[Bench], ConceptVectors | None]
ANOTHER = "another concept's vector"


@dataclass(frozen=True)
class Way(Displayed):
    """One way to steer, the same for every concept.

    ``make``: from what is known of a concept to its vectors; ``None`` adds nothing. ``positions``
    and ``operation`` as in ``SteeringRow``. ``prefixed``: the prefix is put before the test
    question. ``control``: empty, or which one it is. ``columns``: what tables say of it beside its
    name. ``factor``: what each of its coefficients is multiplied by, -1 for the wrong sign.
    """

    name: str
    make: Make | None = None
    positions: Positions = "all"
    operation: str = "add"
    prefixed: bool = False
    control: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0

    @property
    def still(self) -> bool:
        """Whether it has no vectors, and so no coefficients."""
        return self.make is None


@dataclass(frozen=True)
class Fitted:
    """Vectors as a study's variant makes them, from the first ``prompts`` prompts or from all.

    ``learner``: makes one of one's own, instead of the variant's. ``recipe``: another one than the
    experiment's. ``lengths``: whether displacements are the unit, where the recipe has them.
    """

    variant: Variant = field(default_factory=Variant)
    prompts: int | None = None
    learner: Callable[[], object] | None = None
    recipe: Recipe | None = None
    lengths: bool = True

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        bench = bench.of(self.recipe).few(self.prompts)
        if self.learner is None:
            made = bench.steering(self.variant)
            return made if self.lengths or made is None else replace(made, displacement=None)
        vectors = fit_vectors(
            bench.capture,
            self.variant.token,
            self.variant.labels,
            learner=self.learner(),
            recipe=bench.recipe,
            model=bench.model,
            seed=bench.seed,
            progress=False,
        )
        blocks = bench.blocks(self.variant.blocks)
        return vectors if blocks is None else in_blocks(vectors, blocks)


@dataclass(frozen=True)
class OfAnother:
    """The vectors of another concept; ValueError where the experiment has one concept alone."""

    make: Make

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        if bench.other is None:
            raise ValueError("there is no other concept whose vector could be a control")
        return self.make(bench.other)


def controls(
    variant: Variant | None = None, *, several: bool = True, recipe: Recipe | None = None
) -> tuple[Way, ...]:
    """The controls of a variant, by default the recipe's.

    Nothing added, the prefix in the prompt, a random vector, shuffled labels and, where there are
    ``several`` concepts, another one's vector.
    """
    own = Variant() if variant is None else variant
    found = [
        Way("unsteered", control="unsteered"),
        Way("prefix in the prompt", prefixed=True, control="prompted"),
        *(
            Way(name, Fitted(replace(own, control=name), recipe=recipe), control=name)
            for name in ("random vector", "shuffled labels")
        ),
    ]
    if several:
        found.append(Way(ANOTHER, OfAnother(Fitted(own, recipe=recipe)), control=ANOTHER))
    return tuple(found)


def sharing(vectors: ConceptVectors) -> int:
    """How many blocks share a coefficient; those of a displacement need not, each has its own."""
    return steered_blocks(vectors) if vectors.displacement is None else 1


def steered_blocks(vectors: ConceptVectors) -> int:
    """In how many blocks the vectors add something."""
    return int(torch.count_nonzero(vectors.directions.flatten(1).any(dim=1)))
