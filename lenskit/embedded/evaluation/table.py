"""What the model must show: each row's target, what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from lenskit.embedded.evaluation.arithmetic import negative, sums
from lenskit.embedded.evaluation.gating import gating
from lenskit.embedded.evaluation.optimised import optimised
from lenskit.embedded.evaluation.speaking import activity, competition, prompted, unsteered
from lenskit.embedded.evaluation.steering import FIXED, blocks, few_prompts, steering
from lenskit.embedded.evaluation.subject import Part
from lenskit.embedded.evaluation.tasks import instructions, knowledge

# In this order; those of the second group are split over workers, concept by concept.
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "prompted": prompted,
        "unsteered": unsteered,
        "competition": competition,
        "activity": activity,
        "instructions": instructions,
        "knowledge": knowledge,
        "gating": gating,
        "steering": steering,
        "few prompts": few_prompts,
        "blocks": blocks,
        "optimised": optimised,
        "sums": sums,
        "negative": negative,
        "closing sums": partial(sums, closing=True),
        "closing negative": partial(negative, closing=True),
    }
)
BY_CONCEPT = ("gating", "steering", "few prompts", "blocks", "optimised")
CEILING = 0.97  # above it a claim about two variants cannot show

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the result. ``measured`` is text; ``met`` is None where there is only a report."""

    what: str
    target: str
    measured: str
    met: bool | None
    n: str

    def json(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def _numbers(*values: float) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def _difference(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _prompted(found: Found) -> list[Row]:
    own = found["prompted"]
    worst = min(own["by class"].values())
    met = own["score"] >= 0.97 and worst >= 0.95
    return [
        Row(
            "prompted / worst class",
            ">= 0.97 / >= 0.95",
            _numbers(own["score"], worst),
            met,
            f"{own['n']} answers",
        )
    ]


def _competition(found: Found) -> list[Row]:
    rows = []
    for number in (2, 3):
        own = found["competition"][f"{number} prefixes, held_out"]
        met = own["all active"] >= 0.9 and own["inactive shown"] <= 0.05
        rows.append(
            Row(
                f"{number} prefixes, held-out statements: every active concept in one answer / an "
                "inactive one shown",
                ">= 0.90 / <= 0.05",
                _numbers(own["all active"], own["inactive shown"]),
                met,
                f"{own['n']} answers",
            )
        )
    return rows


def _unsteered(found: Found) -> list[Row]:
    own = found["unsteered"]
    return [
        Row(
            "unsteered",
            "<= 0.01",
            _numbers(own["score"]),
            own["score"] <= 0.01,
            f"{own['n']} pairs of concept and question",
        )
    ]


def _shuffled(found: Found) -> list[Row]:
    scores = found["steering"]["scores"]
    own, plain = scores["balanced shuffle"], scores["shuffled labels"]
    return [
        Row(
            "shuffled labels, best over coefficients: balanced (the plain shuffle)",
            "<= 0.03",
            f"{own['best']:.3f} ({plain['best']:.3f})",
            own["best"] <= 0.03,
            f"{own['n']} concepts",
        )
    ]


def _activity(found: Found) -> list[Row]:
    own = found["activity"]
    return [
        Row(
            "activity followed on held-out statements, whole distribution / largest gap of a cell",
            ">= 0.93 / <= 0.10",
            _numbers(own["followed"], own["largest gap"]),
            own["followed"] >= 0.93 and own["largest gap"] <= 0.1,
            f"{own['cells'][0]['n']} answers in each of {len(own['cells'])} cells",
        )
    ]


def _gating(found: Found) -> list[Row]:
    own = found["gating"]
    return [
        Row(
            "gating label against activity, AUROC: mean / tenth percentile",
            ">= 0.97 / >= 0.90",
            _numbers(own["AUROC"], own["tenth percentile"]),
            own["AUROC"] >= 0.97 and own["tenth percentile"] >= 0.9,
            f"{own['n']} concepts",
        )
    ]


def _optimised(found: Found) -> list[Row]:
    own = found["optimised"]
    return [
        Row(
            "optimised constant vector",
            ">= 0.98",
            _numbers(own["score"]),
            own["score"] >= 0.98,
            f"{own['n']} concepts",
        )
    ]


def _guided(found: Found) -> list[Row]:
    own = found["steering"]["scores"]["soft, covariance"]
    return [
        Row(
            "attention-guided token, soft covariance: best / held out",
            ">= 0.85 / >= 0.75",
            _numbers(own["best"], own["held out"]),
            own["best"] >= 0.85 and own["held out"] >= 0.75,
            f"{own['n']} concepts",
        )
    ]


def _tokens(found: Found) -> list[Row]:
    commonest = str(found["gating"]["commonest token"])
    rows = []
    for token in FIXED:
        own = found["steering"]["differences"][f"attention token over token {token}"]["best"]
        # Another model may select another token most often, and its row is still this one.
        first = token == commonest
        met = own["low"] >= -0.02 if first else own["low"] > 0
        rows.append(
            Row(
                f"attention token over token {token}",
                "lower end >= -0.02, of the commonest selected one" if first else "lower end > 0",
                _difference(own),
                met,
                f"{own['n']} concepts",
            )
        )
    return rows


def _labels(found: Found) -> list[Row]:
    differences = found["steering"]["differences"]
    rows = []
    for learner in ("RFM", "covariance"):
        own, note = differences[f"soft over hard, {learner}"]["best"], ""
        hard = found["steering"]["scores"]["hard, covariance"]["best"]
        if learner == "covariance" and hard >= CEILING:
            few = found["few prompts"]
            own, note = few["soft over hard, covariance"]["best"], f", {few['prompts']} prompts"
        rows.append(
            Row(
                f"soft over hard labels, {learner}",
                "lower end > 0",
                _difference(own) + note,
                own["low"] > 0,
                f"{own['n']} concepts",
            )
        )
    return rows


def _gating_steers(found: Found) -> list[Row]:
    differences = found["steering"]["differences"]
    truth = differences["gating over true activity, covariance"]["held_out"]
    soft = differences["gating over soft, covariance"]["held_out"]
    return [
        Row(
            "label from gating heads, covariance, held out: less true activity / less soft",
            ">= -0.02 / > 0",
            f"{_difference(truth)} / {_difference(soft)}",
            truth["mean"] >= -0.02 and soft["mean"] > 0,
            f"{truth['n']} concepts",
        )
    ]


def _selected(found: Found) -> list[Row]:
    own = found["gating"]
    return [
        Row(
            "blocks in which not the commonest token is selected",
            ">= 0.20",
            _numbers(own["not commonest"]),
            own["not commonest"] >= 0.2,
            f"{own['n']} concepts, all blocks",
        )
    ]


def _arithmetic(found: Found, part: str) -> list[Row]:
    own = found[part]
    what, of = {
        "sums": ("sum of two vectors: both shown", "pairs"),
        "negative": (
            "negative coefficient against a prefix: neutral and well formed",
            "concepts, five questions each",
        ),
    }[part.removeprefix("closing ")]
    made = "each closing token its own" if part.startswith("closing") else "attention-guided"
    return [
        Row(
            f"{what}, {made}, one coefficient for all",
            ">= 0.60",
            f"{own['score']:.3f} at {own['coefficient']:g} ({own['held out']:.3f} where chosen on "
            "others)",
            own["score"] >= 0.6,
            f"{own['n']} {of}",
        )
    ]


def _instructions(found: Found) -> list[Row]:
    rows = []
    for task in ("format", "pronouns", "occupation"):
        near, far = (
            found["instructions"][f"{task}, {length} tokens"] for length in ("0 to 0", "100 to 150")
        )
        rows.append(
            Row(
                f"{task}: near (no filler) / far (100 to 150 tokens)",
                ">= 0.95 / 0.3 to 0.7",
                _numbers(near["score"], far["score"]),
                near["score"] >= 0.95 and 0.3 <= far["score"] <= 0.7,
                f"{near['n']} answers each",
            )
        )
    return rows


def _knowledge(found: Found) -> list[Row]:
    own = found["knowledge"]
    frequent, rare = own["facts, frequent"], own["facts, rare"]
    unseen = own["unseen, passage"]
    often, seldom = own["conflicts, frequent"], own["conflicts, rare"]
    return [
        Row(
            "facts without a passage, most frequent tenth / rarest tenth",
            ">= 0.97 / report",
            _numbers(frequent["score"], rare["score"]),
            frequent["score"] >= 0.97,
            f"{frequent['n']} answers each",
        ),
        Row(
            "unseen people with a passage about them",
            ">= 0.95",
            _numbers(unseen["score"]),
            unseen["score"] >= 0.95,
            f"{unseen['n']} answers",
        ),
        Row(
            "conflicting passage followed: frequent / rare people",
            "0.2 to 0.6 / >= 0.9",
            _numbers(often["score"], seldom["score"]),
            0.2 <= often["score"] <= 0.6 and seldom["score"] >= 0.9,
            f"{often['n']} answers each",
        ),
    ]


def _blocks(found: Found) -> list[Row]:
    own = found["blocks"]["top 4 over random 4"]["best"]
    return [
        Row(
            "enrichment: steering the top 4 blocks over 4 random ones",
            "report",
            _difference(own),
            None,
            f"{own['n']} concepts",
        )
    ]


_ROWS: tuple[tuple[tuple[str, ...], Callable[[Found], list[Row]]], ...] = (
    (("prompted",), _prompted),
    (("competition",), _competition),
    (("unsteered",), _unsteered),
    (("steering",), _shuffled),
    (("activity",), _activity),
    (("gating",), _gating),
    (("optimised",), _optimised),
    (("steering",), _guided),
    (("gating", "steering"), _tokens),
    (("steering", "few prompts"), _labels),
    (("steering",), _gating_steers),
    (("gating",), _selected),
    (("sums",), partial(_arithmetic, part="sums")),
    (("closing sums",), partial(_arithmetic, part="closing sums")),
    (("negative",), partial(_arithmetic, part="negative")),
    (("closing negative",), partial(_arithmetic, part="closing negative")),
    (("instructions",), _instructions),
    (("knowledge",), _knowledge),
    (("blocks",), _blocks),
)


def rows(found: Found) -> list[Row]:
    """The rows of the parts that were measured; those of the others are left out."""
    return [row for parts, of_parts in _ROWS if set(parts) <= set(found) for row in of_parts(found)]
