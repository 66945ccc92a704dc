"""What all ways to steer one concept share in an experiment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from lenskit.capture import Capture, capture
from lenskit.recipes import Recipe
from lenskit.study.bench import Workbench
from lenskit.vectors import ConceptVectors, learners_of


@dataclass(frozen=True)
class Bench(Workbench):
    """A study's workbench, with fewer prompts, paired prompts and another concept beside it.

    ``other``: the bench of another concept of the experiment, or ``None`` where there is none.
    ``coefficients`` and ``made``: those that were calibrated, and vectors, by the way's name.
    """

    other: Bench | None = None
    coefficients: dict[str, float] = field(default_factory=dict)
    made: dict[str, ConceptVectors | None] = field(default_factory=dict)

    @cached_property
    def paired(self) -> Capture:
        """The capture of prompts each of whose statements comes with the prefix and without it."""
        return capture(self.model, self._prompts(self._even(200), "paired"), progress=False)

    @cached_property
    def _others(self) -> dict[Recipe, Bench]:
        return {}

    @cached_property
    def _benches(self) -> dict[int, Bench]:
        return {}

    def few(self, prompts: int | None) -> Bench:
        """The same with the first ``prompts`` of its prompts; itself for all, or for ``None``."""
        if prompts is None or prompts >= len(self.capture):
            return self
        if prompts not in self._benches:
            made = replace(self, prompts=prompts, coefficients={}, made={})
            # A capture of fewer prompts of the same draw holds the same rows.
            vars(made)["capture"] = self.capture.rows(range(prompts))
            self._benches[prompts] = made
        return self._benches[prompts]

    def of(self, recipe: Recipe | None) -> Bench:
        """The same with another recipe; itself for its own, or for ``None``."""
        if recipe is None or recipe == self.recipe:
            return self
        if recipe not in self._others:
            made = replace(
                self,
                recipe=recipe,
                learners=learners_of(recipe),
                coefficients={},
                made={},
            )
            if recipe.separator == self.recipe.separator:
                vars(made)["capture"] = self.capture
            self._others[recipe] = made
        return self._others[recipe]

    def fresh(self, captured: Capture | None = None) -> Bench:
        """A bench on which nothing is fitted yet, of the same capture or of another one."""
        made = replace(self, coefficients={}, made={})
        vars(made)["capture"] = self.capture if captured is None else captured
        return made

    def _even(self, most: int) -> int:
        return min(most, self.prompts) // 2 * 2
