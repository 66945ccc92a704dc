"""The whole method over many concepts, in a folder from which a stopped study goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from transformer_lens.model_bridge import TransformerBridge

from lenskit._progress import Bars
from lenskit.concepts import Concept
from lenskit.scoring import check_grammar_judge, grammar_judge
from lenskit.study.bench import study_concept
from lenskit.study.files import concept_file, distinct, study_folder, write_json
from lenskit.study.study import Study
from lenskit.study.ways import Variant, settings_of, warn_of_silence


def run_study(
    model: TransformerBridge,
    concepts: Iterable[Concept] | Concept,
    variants: Sequence[Variant] | Variant | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **options,
) -> Study:
    """Run ``study_concept`` over concepts, one or more; ``options`` are its own, ``recipe`` too.

    With ``out`` each finished concept is kept in that folder, and a study that was stopped goes on
    from there. Raises ValueError when the folder belongs to a study with other settings or model,
    or when two concepts share class and name; and where the grammar judge meets a concept or a
    model that does not speak the grammar. Warns where the prompted control hardly ever shows the
    concept, so that no score below it can be trusted.

    >>> options = {"coefficients": (0.03, 0.06), "prompts": 40, "max_new_tokens": 3}
    >>> way = lk.Variant(learner="ridge")
    >>> study = lk.run_study(model, concept, way, progress=False, **options)
    >>> study.compare()["learner"].tolist()
    ['ridge']
    """
    concepts = distinct(concepts)
    variants, options = settings_of(variants, options)
    folder = None if out is None else study_folder(Path(out), model, variants, options)
    rows: list[dict] = []
    checked = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("study", total=len(concepts))
        for concept in concepts:
            bar.update(task, description=f"{concept.concept_class or 'custom'}: {concept.name}")
            file = folder and concept_file(folder, concept)
            if file and file.exists():
                rows += json.loads(file.read_text())
            else:
                if not checked and options.get("judge", grammar_judge) is grammar_judge:
                    check_grammar_judge(model, concepts)
                checked = True
                found = study_concept(model, concept, variants, **options)
                rows += found
                if file:
                    write_json(file, found)
            bar.advance(task)
    warn_of_silence(rows)
    return Study(pd.DataFrame(rows))
