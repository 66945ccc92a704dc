"""Which heads to steer: every head alone on every task, and what the scores are worth.

``profile_heads`` gives a ``HeadScores``; its ``top``, ``intersection`` and ``union`` are sets of
heads for ``lk.attend``. Before they are believed: ``reliability`` (do two halves of the samples
agree?), ``overlap`` (do tasks share more heads than independent rankings would?), ``random_like``
(does a random set of the same size, or of the same number in each block, do as well?) and
``curve`` over the number of heads and over the strength::

    train = [lk.tasks.embedded(name, 200, split="train") for name in ("format", "pronouns")]
    scores = lk.profile_heads(model, train, lk.Pasta(alpha=0.01), folder="heads")
    lk.profiling.reliability(scores), lk.profiling.overlap(scores)
    sets = [scores.top(k)["format"] for k in (5, 10, 20)]
    lk.profiling.curve(model, lk.tasks.embedded("format", 200), sets, alphas=(0.01,))
"""

from __future__ import annotations

from lenskit.profiling.comparison import agreement, overlap, random_like, reliability
from lenskit.profiling.contribution import contributions
from lenskit.profiling.curves import ALPHAS, curve
from lenskit.profiling.profile import profile_heads
from lenskit.profiling.scores import HeadScores, Stage

__all__ = [
    "ALPHAS",
    "HeadScores",
    "Stage",
    "agreement",
    "contributions",
    "curve",
    "overlap",
    "profile_heads",
    "random_like",
    "reliability",
]


def __dir__() -> list[str]:
    return __all__
