"""What all cells of an experiment share: budget, prompts, judge and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lenskit._arguments import positive_numbers, whole
from lenskit.recipes import DEFAULT, Recipe
from lenskit.scoring import Judge, grammar_judge
from lenskit.study.calibration import TARGET
from lenskit.study.divergence import neutral_questions
from lenskit.study.identity import identity

# In mean residual norms, shared by the blocks that are steered.
BUDGET = (0.15, 0.25, 0.4, 0.6, 0.9, 1.3, 2.0, 3.0)


@dataclass(frozen=True)
class Setting:
    """What decides the results of an experiment, and ``batch_size``, which does not.

    ``coefficients``: the one budget of every way to steer, in mean residual norms. Each is shared
    equally by the blocks that are steered, so that one block gets as much as all together.
    ``target``: the divergence that all ways are scaled to, in nats a token on the neutral
    ``questions``. ``prompts``: how many a concept's vectors are made from, of ``statements`` or
    else the grammar's. ``judge``, ``max_new_tokens`` and ``seed`` as in ``run_study``.
    """

    coefficients: tuple[float, ...] = BUDGET
    prompts: int = 160
    judge: Judge = grammar_judge
    statements: tuple[str, ...] | None = None
    max_new_tokens: int = 50
    target: float = TARGET
    questions: tuple[str, ...] = field(default_factory=neutral_questions)
    recipe: Recipe = DEFAULT
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        given = positive_numbers("coefficients", self.coefficients)
        if len(set(given)) < len(given):
            raise ValueError(f"coefficients must differ, got {given}")
        object.__setattr__(self, "coefficients", tuple(sorted(given)))
        for name in ("statements", "questions"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise ValueError(f"{name} is one text, {texts!r}; give a list of them")
            object.__setattr__(self, name, None if texts is None else tuple(texts))
        whole("prompts", self.prompts, 8)
        for name in ("max_new_tokens", "batch_size"):
            whole(name, getattr(self, name), 1)
        if not callable(self.judge):
            raise TypeError(f"judge must be callable, got {self.judge!r}")
        if not self.questions or not self.target > 0:
            raise ValueError(
                "target must be above 0 nats, and questions at least one, got "
                f"{self.target} and {self.questions!r}"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Setting:
        """The setting that keyword arguments name; TypeError for one that it has not."""
        names = {each.name for each in fields(cls)}
        if unknown := sorted(set(options) - names):
            raise TypeError(
                f"an experiment has no option {', '.join(unknown)}; it has {sorted(names)}"
            )
        return cls(**given(options))

    @property
    def exact(self) -> bool:
        """Whether the truth is known: the model speaks the grammar, whose judge is asked."""
        return self.judge is grammar_judge and self.statements is None

    def described(self) -> dict[str, Any]:
        """JSON that is equal for what gives equal results."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        own["recipe"] = asdict(self.recipe) | {"why": ""}
        del own["batch_size"]
        return identity(own)


def given(options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The options that are not ``None``, and an experiment's own defaults for the others."""
    return defaults | {name: value for name, value in options.items() if value is not None}
