"""The coefficient that moves a model so far.

Coefficients of two ways to steer cannot be compared: one may add its vectors in more blocks, or to
more tokens. The divergence from the unsteered model's next tokens can, so it is a common budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from lenskit._display import Displayed
from lenskit.intervention import Positions
from lenskit.study.divergence import Unsteered, divergence, each_operation, unsteered

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.steering import Operations
    from lenskit.vectors import Vectors

TARGET = 0.5
_FASTEST = 8.0


class Options(TypedDict, total=False):
    """The keyword arguments of ``calibrate``."""

    target: float
    positions: Sequence[Positions] | Positions
    operations: Operations
    relative: bool | None
    tolerance: float
    most: float
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Calibration(Displayed):
    """The ``coefficient`` at which the mean divergence is the target, and that ``divergence``.

    Where no coefficient tried moves the model so far both are NaN.
    """

    coefficient: float
    divergence: float

    @property
    def reached(self) -> bool:
        """Whether there is such a coefficient."""
        return math.isfinite(self.coefficient)


@overload
def calibrate(
    model: TransformerBridge,
    vectors: Vectors,
    base: Unsteered | Iterable[str] | None = None,
    **options: Unpack[Options],
) -> Calibration: ...
@overload
def calibrate(
    model: TransformerBridge,
    vectors: Sequence[Vectors],
    base: Unsteered | Iterable[str] | None = None,
    **options: Unpack[Options],
) -> list[Calibration]: ...
def calibrate(
    model: TransformerBridge,
    vectors: Vectors | Sequence[Vectors],
    base: Unsteered | Iterable[str] | None = None,
    *,
    target: float = TARGET,
    positions: Sequence[Positions] | Positions = "all",
    operations: Operations = "add",
    relative: bool | None = None,
    tolerance: float = 0.05,
    most: float = 64.0,
    steps: int = 24,
    batch_size: int = 64,
) -> Calibration | list[Calibration]:
    """The coefficient of each of ``vectors`` that moves the model by ``target`` nats a token.

    Found by growing or shrinking the coefficient until the mean ``divergence`` from ``base`` lies
    on both sides of the target, and by interpolation on logarithmic scales from there, to within
    ``tolerance`` of it; the coefficients are those of ``steer``, not above ``most``. Of several
    coefficients it is one; divergence mostly grows with them. ``base``: what ``unsteered`` gives,
    or questions; by default eight neutral ones. All vectors are tried side by side. One of them
    gives one ``Calibration``, a list a list.

    Raises ValueError for a target, tolerance or bound that is not positive.

    >>> found = lk.calibrate(model, vectors, ["What makes a good day?"], target=0.5)
    >>> abs(found.divergence - 0.5) <= 0.025
    True
    """
    for name, value in (("target", target), ("tolerance", tolerance), ("most", most)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    several: list[Any] = list(vectors) if isinstance(vectors, list | tuple) else [vectors]
    where = [positions] * len(several) if isinstance(positions, str) else list(positions)
    done = each_operation(operations, len(several))
    if not isinstance(base, Unsteered):
        base = unsteered(model, base, batch_size=batch_size)
    searches = [_Search(target, tolerance, most) for _ in several]
    for _ in range(steps):
        live = [i for i, search in enumerate(searches) if search.found is None]
        if not live:
            break
        reached = divergence(
            model,
            base,
            [several[i] for i in live],
            [searches[i].coefficient for i in live],
            [where[i] for i in live],
            operations=[done[i] for i in live],
            relative=relative,
            batch_size=batch_size,
        )
        for i, value in zip(live, reached.tolist(), strict=True):
            searches[i].learn(value)
    results = [search.found or Calibration(math.nan, math.nan) for search in searches]
    return results if isinstance(vectors, list | tuple) else results[0]


class _Search:
    """A bracketed search for one way, which learns what the coefficient asked for gave.

    The next guess lies where the line through the bracket's ends, both axes logarithmic, meets the
    target; without a bracket, where a divergence that grows with the square would. A guess that
    does not halve the bracket is followed by one that does.
    """

    def __init__(self, target: float, tolerance: float, most: float) -> None:
        self._target, self._tolerance, self._most = target, tolerance, most
        self._low, self._high = (0.0, 0.0), (math.inf, math.inf)
        self._width = math.inf
        self.coefficient = min(0.1, most)
        self.found: Calibration | None = None

    def learn(self, divergence: float) -> None:
        if abs(divergence - self._target) <= self._tolerance * self._target:
            self.found = Calibration(self.coefficient, divergence)
            return
        # What is not a number comes of too large a coefficient.
        if divergence < self._target:
            self._low = (self.coefficient, divergence)
        else:
            self._high = (self.coefficient, divergence)
        (low, below), (high, above) = self._low, self._high
        if low >= self._most or high < 1e-6:
            self.found = Calibration(math.nan, math.nan)
        elif high == math.inf:
            grown = math.sqrt(self._target / below) if below > 0 else _FASTEST
            self.coefficient = min(low * min(max(grown, 1.25), _FASTEST), self._most)
        elif low == 0:
            shrunk = math.sqrt(above / self._target) if math.isfinite(above) else 2.0
            self.coefficient = high / min(max(shrunk, 1.25), _FASTEST)
        else:
            width = math.log(high / low)
            share = 0.5
            if width <= self._width / 2 and below > 0 and math.isfinite(above):
                share = math.log(self._target / below) / math.log(above / below)
            self._width = width
            self.coefficient = low * math.exp(width * min(max(share, 0.05), 0.95))
