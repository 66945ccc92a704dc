"""An optimistic ceiling: heads chosen on the very prompts that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from lenskit.attention import AttentionEdit, Heads, Pasta, edited
from lenskit.emphasis.keeping import Keeping
from lenskit.study import Row
from lenskit.tasks import TaskPrompt, emphasised_span, label_log_probs

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Oracle:
    """Heads chosen greedily on the very prompts that are scored: an optimistic ceiling.

    ``model``, ``prompts``, ``policy``; what is raised is the mean probability of the target.
    """

    model: TransformerBridge
    prompts: Sequence[TaskPrompt]
    policy: Pasta
    batch_size: int = 64

    def __call__(self, most: int, candidates: int) -> list[Row]:
        """Up to ``most`` heads of the ``candidates`` that do best alone, in the order chosen.

        It ends where no further head helps.
        """
        every = [[pair] for pair in Heads.all(self.model)]
        alone = self._probabilities(every)
        pool = [every[i][0] for i in alone.argsort(descending=True)[:candidates].tolist()]
        taken: list[tuple[int, int]] = []
        rows: list[Row] = []
        best = 0.0
        while pool and len(taken) < most:
            found = self._probabilities([[*taken, pair] for pair in pool])
            place = int(found.argmax())
            if float(found[place]) <= best:
                break
            best = float(found[place])
            taken.append(pool.pop(place))
            rows.append({"block": taken[-1][0], "head": taken[-1][1], "probability": best})
        return rows

    def _probabilities(self, sets: Sequence[Sequence[tuple[int, int]]]) -> Float[Tensor, " set"]:
        spans = [emphasised_span(self.model, prompt) for prompt in self.prompts]
        rows = [(Heads(own), i) for own in sets for i in range(len(spans))]
        edits = [AttentionEdit(spans[i], self.policy, heads) for heads, i in rows]
        asked = [self.prompts[i] for _, i in rows]
        with edited(self.model, edits):
            found = label_log_probs(
                self.model,
                asked,
                [[prompt.target] for prompt in asked],
                batch_size=self.batch_size,
            )
        return found[:, 0].exp().view(len(sets), -1).mean(dim=1)


def oracle(
    model: TransformerBridge,
    prompts: Sequence[TaskPrompt],
    policy: Pasta,
    keep: Keeping,
    *,
    most: int,
    candidates: int,
) -> Heads:
    """The heads of ``Oracle``, kept."""
    found = Oracle(model, prompts, policy)
    rows = keep.rows("oracle", make=partial(found, most, candidates))
    return Heads((row["block"], row["head"]) for row in rows)
