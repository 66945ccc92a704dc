"""How often ``lk.diagnose`` names the fault that was planted.

    python -m benchmarks.diagnosis

Four faults are planted in one concept after the other, until each has so many cases: vectors read
at a wrong token, added in a wrong block, with the wrong sign, or far too strongly. A case counts
where the fault is one: on paraphrases of the test questions, which ``diagnose`` never sees, the
planted steering shows the concept in less than three tenths of what the prefix shows, while what is
right in its place shows it more often (at the coefficient that is used, for sign and strength; at
any that is tried, for token and block). Every concept's cases are kept in OUT, so that a run that
was stopped goes on. OUT/diagnosis.csv has the share of each cause for each fault,
OUT/diagnosis-rightly.csv that of the planted one with its 95 % interval, and
OUT/diagnosis-cases.csv every case. The target is 90 % for each fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lenskit.capture import capture
from lenskit.concepts import Concept, concepts
from lenskit.embedded.grammar import load_grammar
from lenskit.generation import SteeringRow, generate_steered
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.scoring import grammar_judge
from lenskit.study import calibrate, diagnose, neutral_questions, unsteered
from lenskit.vectors import ConceptVectors, fit_vectors

FAULTS = ("wrong token", "wrong block", "wrong sign", "too much")
STEPS = (0.25, 0.5, 1.0, 2.0)
# Of what the prefix shows: less is failing. The word of ``diagnose`` itself, on other questions.
FAILS, TOO_MUCH = 0.3, 6.0
TARGET = 0.9


@dataclass(frozen=True)
class Case:
    """A fault that is one: what is steered with, and where."""

    fault: str
    vectors: ConceptVectors
    coefficient: float
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Planting:
    """One concept: its vectors, and what each way to steer shows on paraphrases."""

    model: Any
    concept: Concept
    prompts: int = 80
    seed: int = 0

    @cached_property
    def captured(self) -> Any:
        # Another draw than that of ``diagnose``, which makes prompts of its own.
        prompts = build_prompts(self.model, self.concept, number=self.prompts, seed=self.seed + 1)
        return capture(self.model, prompts, progress=False)

    def fitted(self, token: str) -> ConceptVectors:
        return fit_vectors(self.captured, token, seed=self.seed, progress=False)

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """Paraphrases of the test questions, at most eight."""
        rules = load_grammar().classes[self.concept.concept_class or ""]
        own = [text for texts in rules.questions for text in texts]
        return tuple(text for text in own if text not in self.concept.questions)[:8]

    @cached_property
    def base(self) -> Any:
        return unsteered(self.model, neutral_questions(4), max_new_tokens=30)

    @cached_property
    def enough(self) -> float:
        rows = [SteeringRow(text, prefix=self.concept.prefix) for text in self.questions]
        return FAILS * float(np.mean(self._scores(rows)))

    def shown(self, ways: Sequence[tuple[ConceptVectors, float]]) -> list[float]:
        """The share of answers that show the concept, of each of the vectors at its coefficient."""
        rows = [SteeringRow(text, own, c) for own, c in ways for text in self.questions]
        return np.array(self._scores(rows)).reshape(len(ways), -1).mean(1).tolist()

    def _scores(self, rows: Sequence[SteeringRow]) -> list[float]:
        said = generate_steered(self.model, rows, relative=True, max_new_tokens=40)
        return [
            float(grammar_judge(self.concept, row.question, text).score)
            for row, text in zip(rows, said, strict=True)
        ]

    def curves(self, several: Sequence[ConceptVectors]) -> list[tuple[float, list[float]]]:
        """For each the calibrated coefficient, and what parts and multiples of it show."""
        found = calibrate(self.model, list(several), self.base, relative=True)
        middle = [each.coefficient if each.reached else 1.0 for each in found]
        ways = [(own, c * s) for own, c in zip(several, middle, strict=True) for s in STEPS]
        shares = np.array(self.shown(ways)).reshape(len(several), -1)
        return list(zip(middle, shares.tolist(), strict=True))

    def cases(self) -> Iterator[Case]:
        """The faults that can be planted in this concept, at most one of each kind."""
        if self.enough < FAILS * 0.2:
            return  # the prefix itself hardly shows it
        number = len(self.fitted("attention"))
        every = tuple(range(number))
        own, each = self.fitted("attention"), self.fitted("each")
        alone = [only(own, (block,)) for block in every]
        placed = [only(each, (block,)) for block in every]
        curves = self.curves([own, *alone, *placed])
        works = [max(shares) >= self.enough for _, shares in curves]
        best = max(range(number + 1), key=lambda i: max(curves[i][1]))
        if works[best]:
            middle, shares = curves[best]
            right = own if best == 0 else alone[best - 1]
            where = every if best == 0 else (best - 1,)
            # The strongest of those that do best.
            c = middle * max(
                s for s, share in zip(STEPS, shares, strict=True) if share == max(shares)
            )
            strong, other = self.shown([(right, TOO_MUCH * c), (turned(right), c)])
            if other < self.enough:
                yield Case("wrong sign", turned(right), c, where)
            if strong < min(self.enough, max(shares) / 2):
                yield Case("too much", right, TOO_MUCH * c, where)
        shares_of = [max(*curves[1 + b][1], *curves[1 + number + b][1]) for b in every]
        worst = min(every, key=shares_of.__getitem__)
        if any(works) and shares_of[worst] < self.enough:
            yield Case("wrong block", alone[worst], curves[1 + worst][0], (worst,))
        yield from self._wrong_tokens([b for b in every if works[1 + b]])

    def _wrong_tokens(self, good: Sequence[int]) -> Iterator[Case]:
        """In the first block that can be, the token whose vector does least, of either sign."""
        for block in good:
            tokens = [f"-{i}" for i in range(1, len(self.captured.candidates) + 1)]
            tried = [only(self.fitted(token), (block,)) for token in tokens]
            both = self.curves([*tried, *map(turned, tried)])
            shown = [max(*both[i][1], *both[i + len(tried)][1]) for i in range(len(tried))]
            worst = shown.index(min(shown))
            if shown[worst] < self.enough:
                yield Case("wrong token", tried[worst], both[worst][0], (block,))
                return


def only(vectors: ConceptVectors, blocks: Sequence[int]) -> ConceptVectors:
    """The vectors, zero outside these blocks."""
    kept = torch.zeros_like(vectors.directions)
    kept[list(blocks)] = vectors.directions[list(blocks)]
    return replace(vectors, directions=kept)


def turned(vectors: ConceptVectors) -> ConceptVectors:
    """The vectors with the other sign."""
    return replace(vectors, directions=-vectors.directions)


def named(case: Case, model: Any, concept: Concept, seed: int = 0) -> str:
    """The cause that ``diagnose`` names, given nothing but the vectors and how they are used."""
    found = diagnose(
        model,
        case.vectors,
        case.coefficient,
        blocks=case.blocks,
        judge=grammar_judge,
        concept=concept,
        relative=True,
        seed=seed,
        max_new_tokens=40,
    )
    return str(found.cause)


def counted(cases: pd.DataFrame) -> pd.DataFrame:
    """The share of each cause that was named, for each fault."""
    shares = cases.groupby("fault", sort=False)["cause"].value_counts(normalize=True)
    found = shares.rename("share").reset_index().rename(columns={"fault": "way"})
    return found.assign(expected=found["way"])[["way", "expected", "cause", "share"]]


def rightly(cases: pd.DataFrame) -> pd.DataFrame:
    """The share named rightly of each fault with its interval, and ``concepts``: the cases."""
    rows = []
    for fault, own in cases.groupby("fault", sort=False):
        right = int((own["cause"] == fault).sum())
        low, high = interval(right, len(own))
        rows.append(
            {"concept_class": "all", "way": fault, "measure": "named rightly"}
            | {"mean": right / len(own), "low": low, "high": high, "concepts": len(own)}
        )
    return pd.DataFrame(rows)


def interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not number:
        return float("nan"), float("nan")
    z, share = 1.96, right / number
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + (z / number / 2) ** 2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def main(
    cases: Annotated[int, typer.Option(help="cases of each fault")] = 25,
    model: Annotated[str, typer.Option(help="a model of the embedded grammar")] = "lenskit-mini",
    prompts: Annotated[int, typer.Option(help="prompts behind the planted vectors")] = 80,
    most: Annotated[int, typer.Option(help="concepts tried at most; 0: all")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the tables")] = Path("data/results"),
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="threads on the CPU")] = None,
) -> None:
    """Plant faults, diagnose them, and count how often the planted one is named."""
    if threads is not None:
        torch.set_num_threads(threads)
    opened = load_model(model, check=False)
    # One class after the other, so that a run that is cut has concepts of all of them.
    columns = [list(members.values()) for members in concepts.values()]
    order = [own[i] for i in range(max(map(len, columns))) for own in columns if i < len(own)]
    file = out / "diagnosis-cases.csv"
    kept = pd.read_csv(file, keep_default_na=False) if file.exists() else pd.DataFrame()
    rows: list[dict[str, Any]] = kept.to_dict("records")
    done = {(row["concept_class"], row["concept"]) for row in rows}
    out.mkdir(parents=True, exist_ok=True)
    for concept in track(order[: most or None], description="concepts"):
        known = (concept.concept_class, concept.name)
        full = {fault for fault in FAULTS if sum(r["fault"] == fault for r in rows) >= cases}
        if len(full) == len(FAULTS):
            break
        if known in done:
            continue
        about = {"concept_class": concept.concept_class, "concept": concept.name}
        found = [
            about
            | {"fault": case.fault, "cause": named(case, opened, concept, seed)}
            | {"blocks": ",".join(map(str, case.blocks)), "coefficient": case.coefficient}
            for case in Planting(opened, concept, prompts, seed).cases()
            if case.fault not in full
        ]
        # A concept in which nothing could be planted is kept too, so as not to be tried again.
        rows += found or [about | {"fault": "", "cause": "", "blocks": "", "coefficient": ""}]
        pd.DataFrame(rows).to_csv(file, index=False)
    planted = pd.DataFrame([row for row in rows if row["fault"]])
    if not len(planted):
        Console().print("no fault could be planted")
        raise typer.Exit(1)
    counted(planted).to_csv(out / "diagnosis.csv", index=False)
    rightly(planted).to_csv(out / "diagnosis-rightly.csv", index=False)
    table = Table("fault", "cases", "named rightly", "95 %", "else", title="planted faults")
    shares = rightly(planted).set_index("way")
    for fault in FAULTS:
        if fault not in shares.index:
            table.add_row(fault, "0", "", "", "")
            continue
        row, own = shares.loc[fault], planted[planted["fault"] == fault]
        others = own.loc[own["cause"] != fault, "cause"].value_counts()
        table.add_row(
            fault,
            str(row["concepts"]),
            f"{row['mean']:.0%}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            ", ".join(f"{cause} {number}" for cause, number in others.items()),
        )
    Console().print(table)
    raise typer.Exit(int(not {*FAULTS} <= set(shares[shares["mean"] >= TARGET].index)))


if __name__ == "__main__":
    typer.run(main)
