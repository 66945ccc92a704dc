"""What the embedded model shows, part by part, against its grammar's truth."""

from __future__ import annotations

from lenskit.embedded.evaluation.answers import answers
from lenskit.embedded.evaluation.subject import FULL, QUICK, Scale, Subject, kept, rewritten
from lenskit.embedded.evaluation.table import BY_CONCEPT, PARTS, Row, rows

__all__ = [
    "BY_CONCEPT",
    "FULL",
    "PARTS",
    "QUICK",
    "Row",
    "Scale",
    "Subject",
    "answers",
    "kept",
    "rewritten",
    "rows",
]
