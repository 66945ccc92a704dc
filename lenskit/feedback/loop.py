"""The law of a closed loop: what strength a row's readings ask for, token after token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from lenskit._arguments import whole
from lenskit._display import Displayed
from lenskit.feedback.monitors import Monitor


@dataclass(frozen=True, repr=False)
class ClosedLoop(Displayed):
    """Steering that is on only while what ``monitor`` reads of a row is out of its band.

    ``low`` and ``high``: the band, one of them for both. It is a thermostat: with
    ``when="below"`` steering goes on once the reading is below ``low`` and off once it has come up
    to ``high``; with "above" on above ``high``, off once down at ``low``. In between it stays what
    it was. ``proportional``: the strength follows the reading instead, from all of it at ``low``
    (and below) to none at ``high``; with "above" from all at ``high`` to none at ``low``.
    ``hold``: for how many tokens more a strength is kept: that of a token is the greatest of what
    its reading and the ``hold`` before it asked for. Where steering moves the reading at once, a
    wide band and a hold keep it from flickering.

    ``monitor``: ``Projection``, ``AttentionMass``, or a function of a model that makes a
    ``Reader``. Raises ValueError for bounds that are missing, NaN or in the wrong order.

    >>> loop = lk.ClosedLoop(lk.Projection(vectors, block=3), low=0.1, high=0.3, hold=2)
    """

    monitor: Monitor
    low: float | None = None
    high: float | None = None
    when: Literal["below", "above"] = "below"
    proportional: bool = False
    hold: int = 0

    def __post_init__(self) -> None:
        if not callable(self.monitor):
            raise TypeError(
                "monitor must be a Projection, an AttentionMass, or a function of a model that "
                f"makes a reader; got {self.monitor!r}"
            )
        if self.low is None and self.high is None:
            raise ValueError("low and high are missing; give the band, or one of them for both")
        for name, other in (("low", self.high), ("high", self.low)):
            given: Any = getattr(self, name)
            bound: Any = other if given is None else given
            try:
                object.__setattr__(self, name, float(bound))
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number, got {given!r}") from None
        low, high = self.band
        if not low <= high:
            raise ValueError(f"low must not be above high, and both numbers; got {low} and {high}")
        if self.when not in ("below", "above"):
            raise ValueError(f"when must be 'below' or 'above', got {self.when!r}")
        if self.proportional and not (low < high and math.isfinite(high - low)):
            raise ValueError(
                f"proportional needs a finite low below a finite high; got {low} and {high}"
            )
        whole("hold", self.hold, 0)

    @property
    def band(self) -> tuple[float, float]:
        """Both bounds."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def asked(self, reading: Float[Tensor, "row"], before: Float[Tensor, "row"]) -> Tensor:
        """The strength, 0 to 1, that readings ask for; ``before``: what the last ones asked for.

        A reading that is NaN asks for none.
        """
        low, high = self.band
        below = self.when == "below"
        if self.proportional:
            way = (high - reading if below else reading - low) / (high - low)
            return way.clamp(0, 1).nan_to_num(0.0)
        on = reading < low if below else reading > high
        stays = (reading < high if below else reading > low) & (before > 0)
        return (on | stays).to(reading)
