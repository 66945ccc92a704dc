"""The whole method on many concepts: studies, workers, tables, plans and the demonstration."""

from __future__ import annotations

from lenskit.study.bench import study_concept
from lenskit.study.differences import paired_differences
from lenskit.study.files import distinct, finished, read_study
from lenskit.study.run import run_study
from lenskit.study.study import Study
from lenskit.study.subject import Subject, subject
from lenskit.study.tables import score_table, write_tables
from lenskit.study.ways import COEFFICIENTS, CONTROLS, Variant, variants
from lenskit.study.workers import run_on_workers

__all__ = [
    "COEFFICIENTS",
    "CONTROLS",
    "Study",
    "Variant",
    "distinct",
    "finished",
    "paired_differences",
    "read_study",
    "run_study",
    "study_concept",
    "Subject",
    "subject",
    "variants",
    "score_table",
    "write_tables",
    "run_on_workers",
]


def __dir__() -> list[str]:
    return __all__
