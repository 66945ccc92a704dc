"""Edits beside one another: several vectors, several edits of attention, both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from lenskit.attention import InstABoost, Knockout, attend, span
from lenskit.capture import capture
from lenskit.concepts import Concept, concepts, statement_prompt
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.judge import concepts_shown, parse
from lenskit.emphasis.comparison import Sizes
from lenskit.emphasis.keeping import keeping
from lenskit.emphasis.tables import DRAWS
from lenskit.models import model_fingerprint
from lenskit.prompts import build_prompts
from lenskit.recipes import CLOSING
from lenskit.scoring import Interference, interference, mean_interval
from lenskit.steering import steer
from lenskit.study import Row, experiments
from lenskit.vectors import ConceptVectors, fit_vectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edits: TypeAlias = Mapping[str, Callable[[], AbstractContextManager[Any]]]
Judges: TypeAlias = Mapping[str, Callable[[Any, str], bool]]

TOGETHER, ALONE, WITHOUT, WHOLE = "together", "alone", "without", "well formed"
_PROMPTS, _STATEMENTS = 160, 4
_ACTIVE = 0.9
_REFERENCE = "the edit alone"


@dataclass(frozen=True)
class Asked:
    """Three concepts of different classes, and held-out statements where all three are active."""

    concepts: tuple[Concept, Concept, Concept]
    statements: tuple[str, ...]


def asked_of(number: int, seed: int) -> list[Asked]:
    """So many draws of three concepts and their statements."""
    grammar, random = load_grammar(), Random(f"composition/{seed}")
    active = {
        topic: [name for name, own in grammar.classes.items() if own.activity[topic] >= _ACTIVE]
        for topic in grammar.topics
    }
    topics = [topic for topic, names in active.items() if len(names) >= 3]
    found = []
    for _ in range(number):
        topic = random.choice(topics)
        first, second, third = (
            random.choice(list(concepts[name].values())) for name in random.sample(active[topic], 3)
        )
        statements = random.sample(grammar.statements[topic]["held_out"], _STATEMENTS)
        found.append(Asked((first, second, third), tuple(statements)))
    return found


def three_vectors(
    model: TransformerBridge, asked: Asked, vectors_of: Callable[[Concept], ConceptVectors]
) -> tuple[list[str], Edits, Judges]:
    """A vector for each of the concepts, on bare statements."""
    names = [f"{nth} vector" for nth in ("first", "second", "third")]
    edits = {
        name: partial(steer, model, vectors_of(concept), coefficient=1.0, relative=True)
        for name, concept in zip(names, asked.concepts, strict=True)
    }
    judges = {
        name: partial(_shows, concept, True)
        for name, concept in zip(names, asked.concepts, strict=True)
    }
    return [statement_prompt(text) for text in asked.statements], edits, judges


def vector_and_attention(
    model: TransformerBridge, asked: Asked, vectors_of: Callable[[Concept], ConceptVectors]
) -> tuple[list[str], Edits, Judges]:
    """A vector for the first concept; the second's prefix hidden, the third's emphasised."""
    first, hidden, seen = asked.concepts
    before = f"{hidden.prefix} {seen.prefix}"
    prompts = [statement_prompt(text, before) for text in asked.statements]
    spans = {each: [span(model, text, each.prefix) for text in prompts] for each in (hidden, seen)}
    edits = {
        "vector": partial(steer, model, vectors_of(first), coefficient=1.0, relative=True),
        "knock-out": partial(attend, model, spans[hidden], Knockout()),
        "emphasis": partial(attend, model, spans[seen], InstABoost()),
    }
    judges = {
        "vector": partial(_shows, first, True),
        "knock-out": partial(_shows, hidden, False),
        "emphasis": partial(_shows, seen, True),
    }
    return prompts, edits, judges


MADE = {"three vectors": three_vectors, "vector and attention": vector_and_attention}


def composition(
    model: TransformerBridge,
    sizes: Sizes | None = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    command: str = "",
) -> experiments.Experiment:
    """What edits lose beside one another, over ``sizes.number`` draws of three active concepts.

    "three vectors": each closing token its own, times 1 (what the prefix itself adds), on bare
    statements; each is judged by whether its concept is shown. "vector and attention": a vector of
    the first concept while the second's prefix stands in the prompt and is hidden (judged by
    whether it is silent), and the third's is emphasised by InstABoost. "together" is the score
    beside the others, its difference that to the score "alone"; "without": under no edit;
    "well formed": the share of the answers under all edits of the row that parse to their end.

    With ``out`` parts are kept as in ``compare``.
    """
    sizes = Sizes() if sizes is None else sizes
    settings = {"model": model_fingerprint(model), "sizes": asdict(sizes)}
    asked = asked_of(sizes.number, sizes.seed)
    vectors_of = cache(partial(_vectors, model))
    kept: dict[str, list[Row]] = {name: [] for name in MADE}
    with keeping("composition", out, settings, progress) as keep:
        for (place, one), name in product(enumerate(asked), MADE):

            def made(one: Asked = one, name: str = name) -> list[Row]:
                prompts, edits, judges = MADE[name](model, one, vectors_of)
                found = interference(model, prompts, edits, judges, batch_size=batch_size)
                return _rows(found)

            kept[name] += keep.rows(name, str(place), make=made)
    table = pd.concat([_table(rows, sizes.seed).assign(made=name) for name, rows in kept.items()])
    return experiments.Experiment(
        "composition",
        "What do edits lose beside one another?",
        command or "lk.emphasis.composition(model)",
        table.assign(task="all"),
        _REFERENCE,
        "way",
        notes=(
            f"{model_fingerprint(model)}; {sizes.number} draws of three concepts, {_STATEMENTS} "
            "held-out statements each; intervals are over draws.",
        ),
        group="task",
        counted="n",
    )


def _shows(concept: Concept, wanted: bool, question: Any, answer: str) -> bool:
    return ((concept.concept_class, concept.name) in concepts_shown(answer)) == wanted


def _vectors(model: TransformerBridge, concept: Concept) -> ConceptVectors:
    captured = capture(model, build_prompts(model, concept, number=_PROMPTS), progress=False)
    return fit_vectors(captured, recipe=CLOSING, model=model, progress=False)


def _rows(found: Interference) -> list[Row]:
    """A row for each setting: mean scores over its statements, and how many parse to the end."""
    means = found.scores.mean(dim=-1)
    return [
        {"setting": list(setting), "edits": list(found.edits), "scores": scores.tolist()}
        | {WHOLE: sum(not parse(str(answer))[1] for answer in answers) / len(answers)}
        for setting, scores, answers in zip(found.settings, means, found.answers, strict=True)
    ]


def _table(rows: Sequence[Row], seed: int) -> pd.DataFrame:
    """``Interference.table`` over draws in the place of questions, as rows of an experiment."""
    edits = tuple(rows[0]["edits"])
    settings = tuple(dict.fromkeys(tuple(row["setting"]) for row in rows))
    of = {one: [row for row in rows if tuple(row["setting"]) == one] for one in settings}
    scores = torch.tensor([[row["scores"] for row in of[one]] for one in settings])
    lost = Interference(edits, settings, scores.transpose(1, 2), ())
    found = []
    for row in lost.table(draws=DRAWS, seed=seed).to_dict("records"):
        edit, beside = row["edit"], row["beside"].split(", ")
        setting = next(one for one in settings if {*one} == {edit, *beside})
        judged = edits.index(edit)
        values = {
            TOGETHER: [own["scores"][judged] for own in of[setting]],
            ALONE: [own["scores"][judged] for own in of[(edit,)]],
            WITHOUT: [own["scores"][judged] for own in of[()]],
            WHOLE: [own[WHOLE] for own in of[setting]],
        }
        about = {"way": f"{edit} beside {' and '.join(beside)}", "reference": _REFERENCE}
        for measure, own in values.items():
            low, high = mean_interval(np.array(own), draws=DRAWS, seed=seed)
            ends = {"mean": sum(own) / len(own), "low": low, "high": high, "n": len(own)}
            found.append(about | {"measure": measure} | ends)
        found[-len(values)] |= {
            "difference": row["difference"],
            "difference_low": row["low"],
            "difference_high": row["high"],
        }
    return pd.DataFrame(found)
