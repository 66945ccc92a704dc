"""How far the likelihood judge agrees with the exact judge of the embedded model's grammar.

    python benchmarks/judges.py --concepts 4

Answers to the test questions come from four conditions: unsteered; prompted with the concept's own
prefix; prompted with that of the next concept of its class (the hardest negatives); steered with
the concept's vectors at several coefficients, some of them too large. Each answer is judged for
the concept by both judges. A row gives, for one condition and threshold, the share of ones by each
judge, how often the two agree, and Cohen's kappa (no value where both give one label only). The
last rows before each line are all that is steered, and all conditions together.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lenskit.capture import capture
from lenskit.concepts import Concept, concepts
from lenskit.generation import SteeringRow, generate_steered
from lenskit.labels import soft_labels
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.scoring import cohen_kappa, grammar_judge, likelihood_judge
from lenskit.scoring.judges import answer_likelihoods
from lenskit.selector import select_tokens
from lenskit.vectors import ConceptVectors, fit_vectors

COEFFICIENTS = (0.03, 0.06, 0.1, 0.2, 0.5)
SURPRISES = (1.0, 1.5, 2.0, 3.0, float("inf"))


def main(
    number: Annotated[int, typer.Option("--concepts", help="Concepts of each class.")] = 4,
    prompts: Annotated[int, typer.Option(help="Prompts behind each concept's vectors.")] = 200,
    thresholds: Annotated[str, typer.Option(help="Nats, with commas.")] = "0,1,3,5,10",
    path: Annotated[Path, typer.Option("--model", help="The embedded model.")] = Path(
        "lenskit-mini"
    ),
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.")] = None,
    examples: Annotated[int, typer.Option(help="Disagreements to show.")] = 0,
) -> None:
    """Print the agreement of both judges, by condition and threshold."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(path, check=False)
    asked: list[tuple[str, Concept, SteeringRow]] = []
    for members in concepts.values():
        chosen = list(members.values())[:: max(1, len(members) // number)][:number]
        for i, concept in enumerate(track(chosen, description=members.name, transient=True)):
            vectors = fitted(model, concept, prompts)
            asked += [(*row,) for row in rows(concept, chosen[i - 1], vectors)]
    answers = generate_steered(model, [row for *_, row in asked], relative=True)

    members, questions = [c for _, c, _ in asked], [row.question for *_, row in asked]
    likelihoods = answer_likelihoods(model, members, questions, answers)
    exact = [grammar_judge(*item) for item in zip(members, questions, answers, strict=True)]
    conditions = [condition for condition, *_ in asked]

    table = Table(title=f"likelihood judge against exact judge, {len(asked)} answers")
    for heading in ("nats", "condition", "answers", "exact 1", "likely 1", "agree", "kappa"):
        table.add_column(heading, justify="left" if heading == "condition" else "right")
    for threshold in map(float, thresholds.split(",")):
        likely = likelihood_judge(model, threshold=threshold).verdicts(likelihoods)
        for condition in [*dict.fromkeys(conditions), "steered", "all"]:
            at = [i for i, c in enumerate(conditions) if covers(condition, c)]
            a, b = [exact[i].score for i in at], [likely[i].score for i in at]
            same = sum(x == y for x, y in zip(a, b, strict=True)) / len(at)
            kappa = cohen_kappa(a, b)
            table.add_row(
                f"{threshold:g}",
                condition if condition != "steered" else "steered, all",
                str(len(at)),
                *(f"{share:.1%}" for share in (sum(a) / len(at), sum(b) / len(at), same)),
                "" if kappa != kappa else f"{kappa:.3f}",
                end_section=condition == "all",
            )
    console = Console()
    console.print(table)

    grid = Table(title="kappa of all answers, by the limits of margin and of surprise")
    grid.add_column("nats", justify="right")
    for most in SURPRISES:
        grid.add_column(f"≤ {most:g} a token", justify="right")
    for threshold in map(float, thresholds.split(",")):
        kappas = []
        for most in SURPRISES:
            judge = likelihood_judge(model, threshold=threshold, most_surprise=most)
            likely = judge.verdicts(likelihoods)
            kappas.append(cohen_kappa([v.score for v in exact], [v.score for v in likely]))
        grid.add_row(f"{threshold:g}", *(f"{kappa:.3f}" for kappa in kappas))
    console.print(grid)

    likely = likelihood_judge(model).verdicts(likelihoods)
    wrong = [i for i in range(len(asked)) if exact[i].score != likely[i].score]
    for reasons, times in Counter((exact[i].reason, likely[i].reason) for i in wrong).most_common():
        console.print(f"at the default: exact «{reasons[0]}», likelihood «{reasons[1]}»: {times}")
    for i in wrong[:: max(1, len(wrong) // max(1, examples))][:examples]:
        console.print(
            f"{conditions[i]}, {members[i].name}: {exact[i].reason} / {likely[i].reason}, margin "
            f"{likelihoods.margin[i]:.1f}, surprise {likelihoods.surprise[i]:.2f}: {answers[i]!r}",
            markup=False,
        )


def covers(condition: str, own: str) -> bool:
    """Whether answers of the condition ``own`` belong to the row of ``condition``."""
    return condition in (own, "all") or (condition == "steered" and own.startswith("steered "))


def rows(
    concept: Concept, other: Concept, vectors: ConceptVectors
) -> list[tuple[str, Concept, SteeringRow]]:
    """Condition, concept to judge for, and what to generate."""
    made = []
    for question in concept.questions:
        made += [
            ("unsteered", SteeringRow(question, None, 0.0)),
            ("prompted", SteeringRow(question, None, 0.0, concept.prefix)),
            ("prompted otherwise", SteeringRow(question, None, 0.0, other.prefix)),
        ]
        made += [(f"steered {c:g}", SteeringRow(question, vectors, c)) for c in COEFFICIENTS]
    return [(condition, concept, row) for condition, row in made]


def fitted(model, concept: Concept, number: int) -> ConceptVectors:
    """Vectors as AGS makes them: attention-guided tokens, soft labels, RFM."""
    captured = capture(model, build_prompts(model, concept, number=number), progress=False)
    tokens = select_tokens(captured)
    return fit_vectors(captured, tokens, soft_labels(captured, tokens), learner="rfm")


if __name__ == "__main__":
    typer.run(main)
