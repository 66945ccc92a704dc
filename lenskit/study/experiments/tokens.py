"""Which token a concept is read from, and whether each closing token should have its own vector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from lenskit.concepts import Concept
from lenskit.study.experiments.result import Experiment
from lenskit.study.experiments.run import Model, begun
from lenskit.study.experiments.scores import by_concept, chosen_elsewhere, summary
from lenskit.study.experiments.ways import Fitted, Way, controls
from lenskit.study.ways import Variant

_SAID = {"attention": "token by attention", "each": "each closing token its own vector"}


def tokens(model: Model, concepts: Iterable[Concept] | Concept, **options: Any) -> Experiment:
    """The attention-guided token (Eq. 3) against fixed ones, and each closing token by itself.

    In all blocks, and in one that is chosen on the other concepts: of the attention-guided token,
    of the last one, and of each closing token with its own vector, added there alone. ``parts``
    holds the held-out score of each of these in each single block (at most eight, evenly spaced).

    Options are those of ``lenskit.study.experiments.Setting``, and ``out``, ``workers``, ``gpus``,
    ``ray`` and ``progress`` as in ``run_on_workers``; with workers, ``model`` is a function that
    loads it.
    """
    with begun("tokens", model, concepts, options) as run:
        offsets = [f"-{i}" for i in range(1, min(5, len(run.shape.candidates)) + 1)]
        everywhere = [_way(token) for token in ("attention", *offsets, "each")]
        single = {
            token: [_way(token, block) for block in run.shape.some_blocks]
            for token in ("attention", "-1", "each")
        }
        alone = [way for own in single.values() for way in own]
        answers = run.answers([*everywhere, *controls(several=run.several), *alone])
        one_block = {
            f"{_name(token)}, one block": [way.name for way in own] for token, own in single.items()
        }
        placed = chosen_elsewhere(answers, one_block).assign(blocks="one, chosen elsewhere")
        in_one = answers["way"].isin([way.name for way in alone])
        blocks = by_concept(answers[in_one])
        compared = pd.concat([answers[~in_one], placed], ignore_index=True)
        return run.scored(
            compared,
            "Which token should a concept be read from?",
            parts={"one block": summary(blocks, ["best", "held out"], seed=run.setting.seed)},
            notes=["«one block»: the block is the best one of all other concepts."],
        )


def _name(token: str) -> str:
    return _SAID.get(token, f"token {token}")


def _way(token: str, block: int | None = None) -> Way:
    """The default labels and learner, in all blocks or in one."""
    variant = Variant(token)
    if block is None:
        return Way(_name(token), Fitted(variant), columns={"token": token, "blocks": "all"})
    columns = {"token": token, "blocks": str(block)}
    made = Fitted(replace(variant, blocks=str(block)))
    return Way(f"{_name(token)}, block {block}", made, columns=columns)
