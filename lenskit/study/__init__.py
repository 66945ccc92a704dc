"""The whole method on many concepts: studies, workers, tables, plans and the demonstration."""

from __future__ import annotations

from lenskit.study.answers import study_concept
from lenskit.study.differences import paired_differences
from lenskit.study.engine import CellsFailed
from lenskit.study.run import distinct, finished, read_study, run_on_workers, run_study
from lenskit.study.study import Study
from lenskit.study.subject import Subject, subject
from lenskit.study.tables import score_table, write_tables
from lenskit.study.ways import COEFFICIENTS, CONTROLS, Variant, variants

__all__ = [
    "COEFFICIENTS",
    "CONTROLS",
    "CellsFailed",
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
