"""What is evaluated, how thoroughly, and where the parts of the result are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenskit.capture import Capture, capture
from lenskit.concepts import Concept
from lenskit.embedded.grammar import Grammar, load_grammar, trained_activity
from lenskit.embedded.measures import measured_concepts
from lenskit.embedded.recipe import with_concepts
from lenskit.labels import soft_labels
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.recipes import CLOSING
from lenskit.selector import select_tokens
from lenskit.vectors import ConceptVectors, SoftCovariance, fit_vectors


@dataclass(frozen=True)
class Scale:
    """How much is measured of each part.

    ``spoken``: concepts that are prompted, 0 for all; ``per_cell``: answers of each class x topic;
    ``competing`` and ``tasks``: prompts of each condition; ``concepts``: concepts that are
    steered, with ``prompts`` prompts each, and ``few`` where the claim is tested on few;
    ``statements``: bare statements for each of the ``pairs`` of concepts; ``optimised``: concepts
    of which a vector is optimised, in ``steps`` steps at each of ``blocks``.
    """

    spoken: int = 0
    per_cell: int = 1000
    competing: int = 400
    tasks: int = 300
    concepts: int = 105
    prompts: int = 160
    few: int = 24
    coefficients: tuple[float, ...] = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22)
    pairs: int = 50
    statements: int = 4
    optimised: int = 20
    steps: int = 60
    blocks: tuple[int, ...] = (1, 2, 3, 4)


FULL = Scale()
QUICK = Scale(
    spoken=50,
    per_cell=40,
    competing=100,
    tasks=60,
    concepts=10,
    prompts=80,
    coefficients=(0.03, 0.06, 0.1, 0.17),
    pairs=10,
    statements=2,
    optimised=2,
    steps=40,
)


@dataclass(frozen=True)
class Subject:
    """A model folder under evaluation; ``work`` keeps what was measured of it already.

    ``shard``: (i, n) for every n-th of the steered concepts from the i-th on.
    """

    folder: Path
    work: Path
    scale: Scale = FULL
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    device: str = "cpu"

    @cached_property
    def training(self) -> dict[str, Any]:
        """What the folder's ``training.json`` tells; nothing where there is none."""
        file = self.folder / "training.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @cached_property
    def grammar(self) -> Grammar:
        """The embedded grammar with the concepts and the activity that the model was trained on."""
        grammar = with_concepts(load_grammar(), self.training.get("concepts", 0))
        if "activity" not in self.training:
            return grammar
        classes = {
            name: replace(rules, activity=self.training["activity"][name])
            for name, rules in grammar.classes.items()
        }
        return replace(grammar, classes=classes)

    @property
    def truth_is_shared(self) -> bool:
        """Whether ``true_activity``, which is that of the library's own model, holds here too."""
        known = trained_activity()
        return all(dict(c.activity) == known[name] for name, c in self.grammar.classes.items())

    @cached_property
    def concepts(self) -> list[Concept]:
        """The concepts that are steered, evenly over the classes; of a shard, its own."""
        first, step = self.shard
        return measured_concepts(self.grammar, self.scale.concepts)[first::step]

    @cached_property
    def plain(self) -> Any:
        """The model by ``transformers`` alone, which proves the folder an ordinary checkpoint."""
        loaded = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return loaded.to(self.device).eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder."""
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def model(self) -> TransformerBridge:
        """The model as lenskit loads it."""
        return load_model(self.folder, dtype=torch.float32, device=self.device, check=False)

    def capture(self, concept: Concept) -> Capture:
        """The capture that a concept's labels and vectors are read from."""
        prompts = build_prompts(self.model, concept, number=self.scale.prompts, seed=self.seed)
        return capture(self.model, prompts, progress=False)

    def vectors(self, concept: Concept, captured: Capture | None = None) -> ConceptVectors:
        """Attention-guided token, soft labels, covariance; kept in a file."""

        def made() -> ConceptVectors:
            own = captured or self.capture(concept)
            tokens = select_tokens(own)
            labels = soft_labels(own, tokens, constant="hard")
            return fit_vectors(
                own, tokens, labels, learner=SoftCovariance(), seed=self.seed, progress=False
            )

        return self._kept("vectors", concept, made)

    def closing_vectors(self, concept: Concept) -> ConceptVectors:
        """Each closing token its own vector, by increments, in displacements; kept in a file."""

        def made() -> ConceptVectors:
            own = self.capture(concept)
            return fit_vectors(
                own, recipe=CLOSING, model=self.model, seed=self.seed, progress=False
            )

        return self._kept("closing vectors", concept, made)

    def _kept(
        self, part: str, concept: Concept, make: Callable[[], ConceptVectors]
    ) -> ConceptVectors:
        file = self.file(part, concept, "safetensors")
        if not file.exists():
            temporary = file.with_suffix(f".{os.getpid()}")
            make().save(temporary)
            temporary.replace(file)
        return ConceptVectors.load(file)

    def file(self, part: str, concept: Concept, suffix: str = "json") -> Path:
        """Where a part keeps what it found of one concept."""
        folder = self.work / part
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in concept.name)
        return folder / f"{concept.concept_class}.{name}.{suffix}"


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What ``file`` holds; if there is none, it is made and written, whole or not at all."""
    if not file.exists():
        rewritten(file, make())
    return json.loads(file.read_text())


def rewritten(file: Path, found: Mapping[str, Any]) -> None:
    """Write ``file``, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(file)


def mean(values: Sequence[float]) -> float:
    """The mean, NaN of nothing."""
    return sum(values) / len(values) if len(values) else float("nan")


def mean_of(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean, ends of its 95 % bootstrap interval over the values, and their number."""
    value, number = mean(values), len(values)
    low = high = value
    if number > 1 and max(values) > min(values):
        sample = np.asarray(values, dtype=np.float64)
        found = bootstrap((sample,), np.mean, method="percentile", rng=seed).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"mean": value, "low": low, "high": high, "n": number}


Part = Callable[[Subject], Mapping[str, Any]]
