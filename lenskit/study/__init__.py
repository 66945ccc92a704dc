"""The whole method on many concepts: studies, workers, tables, plans and the demonstration."""

from __future__ import annotations

from lenskit.study import experiments
from lenskit.study.answers import study_concept
from lenskit.study.calibration import Calibration, calibrate
from lenskit.study.cells import CellStore, Key, Row
from lenskit.study.diagnosis import Diagnosis, diagnose
from lenskit.study.differences import paired_differences
from lenskit.study.divergence import Unsteered, divergence, neutral_questions, unsteered
from lenskit.study.edit_diagnosis import diagnose_edit
from lenskit.study.engine import CellsFailed, Here, Pool, run_cells
from lenskit.study.identity import identity
from lenskit.study.look import Look, look
from lenskit.study.pools import pool_of, workers_of
from lenskit.study.run import distinct, finished, read_study, run_on_workers, run_study
from lenskit.study.study import Study
from lenskit.study.subject import Subject, subject
from lenskit.study.tables import score_table, write_tables
from lenskit.study.ways import COEFFICIENTS, CONTROLS, Variant, variants

__all__ = [
    "COEFFICIENTS",
    "CONTROLS",
    "Calibration",
    "Diagnosis",
    "Unsteered",
    "calibrate",
    "diagnose",
    "diagnose_edit",
    "divergence",
    "neutral_questions",
    "unsteered",
    "CellStore",
    "CellsFailed",
    "Here",
    "Key",
    "Look",
    "Pool",
    "Row",
    "Study",
    "Variant",
    "distinct",
    "experiments",
    "finished",
    "identity",
    "look",
    "paired_differences",
    "read_study",
    "run_cells",
    "run_study",
    "study_concept",
    "Subject",
    "subject",
    "variants",
    "score_table",
    "write_tables",
    "run_on_workers",
    "pool_of",
    "workers_of",
]


def __dir__() -> list[str]:
    return __all__
