"""Figures as files: vectors for print and pixels for screens, the same bytes at every run."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

FORMATS = ("svg", "png")


def save_figure(figure: Figure, file: str | Path) -> list[Path]:
    """Write ``file`` as ``.svg`` and ``.png`` and return both paths; folders are made.

    Nothing in them depends on time, machine or process, so that equal figures give equal files; the
    figure's ``alt`` text is the description of the SVG. An ending of ``file`` is left as it is:
    "tokens" gives "tokens.svg" and "tokens.png".
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    alt = getattr(figure, "alt", "")
    told: dict[str, dict[str, str | None]] = {
        "svg": {"Date": None, "Creator": None},
        "png": {"Software": None},
    }
    if alt:
        told["svg"]["Description"] = alt
        told["png"]["Description"] = alt
    written = []
    # Ids inside the SVG are drawn at random without a salt.
    with rc_context({"svg.hashsalt": "lenskit", "svg.fonttype": "path", "savefig.dpi": 160}):
        for ending in FORMATS:
            written.append(file.with_name(f"{file.name}.{ending}"))
            figure.savefig(written[-1], format=ending, metadata=told[ending])
    _number_clips(written[0])
    return written


def _number_clips(file: Path) -> None:
    """Number the clip paths of an SVG in their order.

    Their ids are hashes of bounds whose last bits differ from run to run.
    """
    text = file.read_text(encoding="utf-8")
    ids = re.findall(r'clipPath id="(p[0-9a-f]+)"', text)
    numbers = {own: f"clip{place}" for place, own in enumerate(ids)}
    text = re.sub(
        r'(clipPath id="|url\(#)(p[0-9a-f]+)', lambda found: found[1] + numbers[found[2]], text
    )
    file.write_text(text, encoding="utf-8")
