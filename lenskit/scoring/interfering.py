"""Do edits get in each other's way? Each alone, each pair, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit._display import Displayed, count
from lenskit.embedded.judge import Verdict
from lenskit.generation import Answer, Options, generate
from lenskit.models import Conversation, using
from lenskit.scoring.intervals import mean_interval
from lenskit.scoring.steerability import as_verdict

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Question: TypeAlias = "str | Conversation"
AnswerJudge: TypeAlias = Callable[[Any, str], "Verdict | float"]


@dataclass(frozen=True, repr=False)
class Interference(Displayed):
    """What each edit's judge gives the answers under none, one, two and all of the edits.

    ``edits``: their names. ``settings``: which of them were applied together, none of them first.
    ``scores``: of each setting's answers by each edit's judge, 0 to 1. ``answers``: these.
    """

    edits: tuple[str, ...]
    settings: tuple[tuple[str, ...], ...]
    scores: Float[Tensor, "setting edit question"]
    answers: tuple[tuple[Answer, ...], ...]

    def table(self, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> pd.DataFrame:
        """What each edit loses beside others: a row for each edit and each setting with more of it.

        ``edit`` is judged ``beside`` the others of the setting. Mean scores: ``without`` any edit,
        ``alone``, ``others`` (these without it; NaN where that was not run) and ``together``.
        ``difference``: together less alone over the same ``questions``, negative where it loses,
        with the ends ``low`` and ``high`` of its interval at ``level`` (``draws`` bootstrap samples
        of questions; NaN for a single one).
        """
        place = {setting: number for number, setting in enumerate(self.settings)}
        rows = []
        for i, edit in enumerate(self.edits):
            of_setting = {setting: self.scores[place[setting], i] for setting in self.settings}
            alone = of_setting[(edit,)]
            for setting, together in of_setting.items():
                others = tuple(name for name in setting if name != edit)
                if edit not in setting or not others:
                    continue
                difference = (together - alone).double().numpy()
                low, high = mean_interval(difference, level=level, draws=draws, seed=seed)
                rows.append(
                    {"edit": edit, "beside": ", ".join(others)}
                    | {"without": float(of_setting[()].mean()), "alone": float(alone.mean())}
                    | {
                        "others": float(of_setting[others].mean())
                        if others in place
                        else float("nan")
                    }
                    | {"together": float(together.mean()), "difference": float(difference.mean())}
                    | {"low": low, "high": high, "questions": len(difference)}
                )
        return pd.DataFrame(rows)

    def _headline(self) -> str:
        return (
            f"Interference of {count(len(self.edits), 'edit')}, "
            f"{count(self.scores.shape[2], 'question')}: score alone, together, difference [95 %]"
        )

    def _rows(self) -> dict[str, object]:
        """What loses most stands first."""
        return {
            f"{row['edit']} beside {row['beside']}": (
                f"{row['alone']:.2f}  {row['together']:.2f}  {row['difference']:+.2f} "
                f"[{row['low']:+.2f}, {row['high']:+.2f}]"
            )
            for row in self.table().sort_values("difference", kind="stable").to_dict("records")
        }


def interference(
    model: TransformerBridge,
    questions: Sequence[Question],
    edits: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    judges: Mapping[str, AnswerJudge],
    **options: Unpack[Options],
) -> Interference:
    """Answer the questions under each edit alone, each pair and all, and let all judges score all.

    ``edits``: for each name a function that makes its context (``steer``, ``attend``,
    ``regulate``), such as ``partial(lk.steer, model, vectors, coefficient=0.04)``; the first are
    the outermost. ``judges``: for each name a function of question and answer that returns a
    ``Verdict``, a bool or a number from 0 to 1, such as ``partial(judge, concept)``. ``options``
    are those of ``generate``. Costs ``2 + n + n(n-1)/2`` runs over the questions for n > 2 edits.

    Raises ``ValueError`` for fewer than two edits, judges of other names and no questions,
    ``TypeError`` for a context where a function that makes one is needed.

    >>> from functools import partial
    >>> towards = partial(lk.steer, model, vectors, coefficient=0.04)
    >>> edits = {"towards": towards, "away": partial(lk.steer, model, -0.04 * vectors)}
    >>> judges = dict.fromkeys(edits, partial(lk.grammar_judge, concept))
    >>> found = lk.interference(model, concept.questions, edits, judges, max_new_tokens=8)
    >>> found.settings
    ((), ('towards',), ('away',), ('towards', 'away'))
    """
    names = tuple(edits)
    if len(names) < 2:
        raise ValueError(f"edits must be two or more, by name; got {list(names)}")
    for name, make in edits.items():
        if isinstance(make, AbstractContextManager) or not callable(make):
            raise TypeError(
                f"edits[{name!r}] must be a function that makes a context, such as "
                f"partial(lk.steer, model, vectors, coefficient=0.04); got {type(make).__name__}"
            )
    if {*judges} != {*names}:
        raise ValueError(f"judges must be for the edits {list(names)}; got {list(judges)}")
    if isinstance(questions, str | Mapping) or not len(questions):
        raise ValueError(f"questions must be a list of one or more; got {questions!r}")
    sizes = dict.fromkeys((0, 1, 2, len(names)))
    settings = tuple(some for size in sizes for some in combinations(names, size))
    answers = []
    with using(model):
        for setting in settings:
            with ExitStack() as stack:
                for name in setting:
                    stack.enter_context(edits[name]())
                answers.append(tuple(generate(model, questions, **options)))
    scores = torch.tensor(
        [
            [
                [
                    as_verdict(judges[name](question, answer)).score
                    for question, answer in zip(questions, own, strict=True)
                ]
                for name in names
            ]
            for own in answers
        ],
        dtype=torch.float64,
    )
    return Interference(names, settings, scores, tuple(answers))
