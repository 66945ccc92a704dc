"""What the check found on the embedded model, kept beside its weights so that loading is quick.

``check.json`` holds the report, a hash of the files that decide it, and the versions of the
packages with which it was made. Where anything of this differs the check runs again. After a new
training, or for new versions, ``python -m lenskit.models.verdict`` checks and writes anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lenskit.models.check import ModelReport

FILE = "check.json"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_PACKAGES = ("torch", "transformers", "transformer-lens")


def kept_report(folder: str | Path) -> ModelReport | None:
    """The report of an earlier check in float32 on a CPU, if it is of these files and packages."""
    try:
        kept = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        if {key: kept[key] for key in ("files", "versions")} != _circumstances(folder):
            return None
        found: dict[str, Any] = kept["report"]
        tuples = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
        return ModelReport(**{**found, **tuples})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep_report(folder: str | Path, report: ModelReport) -> Path:
    """Write the report of a check in float32 on a CPU beside the weights."""
    file = Path(folder) / FILE
    kept = {**_circumstances(folder), "report": asdict(report)}
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return file


def _circumstances(folder: str | Path) -> dict[str, Any]:
    """What the report depends on. Patch releases are held to change nothing."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(hashlib.sha256((Path(folder) / name).read_bytes()).digest())
    versions = {name: ".".join(version(name).split(".")[:2]) for name in _PACKAGES}
    return {"files": digest.hexdigest(), "versions": versions}


if __name__ == "__main__":
    from lenskit.models import EMBEDDED, load_model, model_location, model_report

    place = Path(model_location(EMBEDDED))
    (place / FILE).unlink(missing_ok=True)
    keep_report(place, model_report(load_model(place, device="cpu")))
