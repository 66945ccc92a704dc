"""Why does an edit of attention not help? The same kind of answer as for a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit._arguments import whole
from lenskit.attention import AttentionEdit, Heads, KeyPolicy, Policy, Span
from lenskit.generation import SteeringRow, generate_steered
from lenskit.scoring import repetition
from lenskit.study.diagnosis import WORKS, Diagnosis
from lenskit.study.probe import REPEATED
from lenskit.tasks import Task, emphasised_span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

GAINS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# What must be gained by some edit for anything to be seen.
LEAST = 0.1
_OWN = "as given"


def diagnose_edit(
    model: TransformerBridge,
    task: Task,
    policy: Policy,
    heads: Heads | None = None,
    *,
    spans: Sequence[Span | None] | None = None,
    others: Sequence[Heads] | None = None,
    gains: Sequence[float] = GAINS,
    protect_bos: bool = False,
    batch_size: int = 256,
) -> Diagnosis:
    """The likely cause why an edit of attention does not help on a task, and strengths to try.

    The task's prompts are answered with the edit as it is and with its bias times ``gains`` (the
    ``coefficient`` of the table), with the task's own spans in place of ``spans`` (those that were
    used), and with other heads: all, and those of each block, or ``others``. What gains at least
    ``LEAST`` of the score, and not less than a share ``WORKS`` of what the best of all these does,
    helps.

    Causes: "works"; "too strong" and "too little": it helps at a weaker or stronger bias alone, and
    ``coefficients`` says from which to which; "wrong span": the task's own spans help where those
    that were given do not; "irrelevant heads": other heads help where these do not at any strength,
    and ``heads`` of the result are the best of them; "unknown": nothing of all this helps.

    Raises ValueError for policies of keys, whose strength is their gain, for no gains, and for
    spans that are not as many as the prompts.

    >>> task = lk.tasks.embedded("count", 2)
    >>> some, others = lk.Heads({0: [0]}), [lk.Heads({1: [0]})]
    >>> found = lk.diagnose_edit(model, task, lk.Pasta(0.01), some, others=others, gains=(0.5,))
    >>> found.table["coefficient"].tolist()
    [0.5, 1.0]
    """
    if isinstance(policy, KeyPolicy):
        raise ValueError(
            f"{type(policy).__name__} edits keys, whose strength is its gain; give a policy of "
            "scores"
        )
    strengths = sorted({1.0, *map(float, gains)})
    if not gains or strengths[0] <= 0:
        raise ValueError(f"gains must be numbers above 0, got {list(gains)}")
    right = [emphasised_span(model, prompt) for prompt in task.prompts]
    given = right if spans is None else list(spans)
    if len(given) != len(right):
        raise ValueError(f"spans: the task has {len(right)} prompts, got {len(given)}")
    every = Heads.all(model)
    own = every if heads is None else heads
    probe = _Probe(model, task, policy, protect_bos, whole("batch_size", batch_size, 1))
    tried: dict[str, _Tried] = {_OWN: _Tried(given, own)}
    if spans is not None:
        tried["the task's spans"] = _Tried(right, own)
    more = {
        "all heads": every,
        **{f"block {b}": Heads({b: h}) for b, h in every.by_block().items()},
    }
    if others is not None:
        more = {f"others, {i + 1}": each for i, each in enumerate(others)}
    tried |= {name: _Tried(right, each) for name, each in more.items() if each != own}
    plain = probe.table(None, [0.0])
    without = float(plain["shown"][0])
    tables = {name: probe.table(each, strengths) for name, each in tried.items()}
    best = {name: float(each["shown"].max()) for name, each in tables.items()}
    table = tables[_OWN]
    goal = max(best.values())
    if goal - without < LEAST:
        return _found("unknown", None, table, without, best)
    enough = without + max(LEAST, WORKS * (goal - without))
    as_given = float(table.loc[table["coefficient"] == 1.0, "shown"].iloc[0])
    if as_given >= enough:
        return _found("works", _range(table, enough), table, without, best)
    helping = table[table["shown"] >= enough]
    if len(helping):
        weaker = bool((helping["coefficient"] < 1).any())
        cause = "too strong" if weaker else "too little"
        return _found(cause, _range(table, enough), table, without, best)
    if best.get("the task's spans", 0.0) >= enough:
        found = tables["the task's spans"]
        return _found("wrong span", _range(found, enough), table, without, best)
    name = max(more.keys() & best.keys(), key=lambda each: best[each])
    found = tables[name]
    return _found(
        "irrelevant heads", _range(found, enough), table, without, best, tried[name].heads
    )


@dataclass(frozen=True)
class _Tried:
    """Spans and heads that the policy is tried with."""

    spans: Sequence[Span | None]
    heads: Heads


@dataclass(frozen=True)
class _Probe:
    """Answers to the task under a policy at several strengths, and what they show."""

    model: TransformerBridge
    task: Task
    policy: Policy
    protect_bos: bool
    batch_size: int

    def table(self, tried: _Tried | None, strengths: Sequence[float]) -> pd.DataFrame:
        """For each strength: the score, and the shares that repeat themselves or are unchanged."""
        plain = self._answers([None] * len(self.task))
        rows = []
        for strength in strengths:
            said = plain
            if tried is not None:
                edits = [
                    None
                    if span is None
                    else AttentionEdit(
                        span,
                        self.policy,
                        tried.heads,
                        schedule=None if strength == 1 else _times(strength),
                        protect_bos=self.protect_bos,
                    )
                    for span in tried.spans
                ]
                said = self._answers(edits)
            rows.append(
                {"coefficient": strength, "shown": self.task.score(said)}
                | {"repeated": sum(repetition(a) > REPEATED for a in said) / len(said)}
                | {"unchanged": sum(a == b for a, b in zip(said, plain, strict=True)) / len(said)}
            )
        return pd.DataFrame(rows)

    def _answers(self, edits: Sequence[AttentionEdit | None]) -> list[Any]:
        rows = [
            SteeringRow(prompt.messages, attention=edit)
            for prompt, edit in zip(self.task.prompts, edits, strict=True)
        ]
        options = {"max_new_tokens": self.task.max_new_tokens, "batch_size": self.batch_size}
        return generate_steered(self.model, rows, **options)  # type: ignore[arg-type]


def _times(strength: float) -> Callable[[Any], Any]:
    return lambda steps: strength + 0.0 * steps


def _range(table: pd.DataFrame, enough: float) -> tuple[float, float]:
    """From the least to the greatest strength that helps."""
    own = table.loc[table["shown"] >= enough, "coefficient"]
    return float(own.min()), float(own.max())


def _found(
    cause: Any,
    coefficients: tuple[float, float] | None,
    table: pd.DataFrame,
    without: float,
    best: dict[str, float],
    heads: Heads | None = None,
) -> Diagnosis:
    reference = {name: score for name, score in best.items() if name != _OWN}
    return Diagnosis(cause, coefficients, table, without, reference, heads=heads, of="edit")
