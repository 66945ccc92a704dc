"""What a notebook is about: a model, a concept and a judge, named in its first cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lenskit._display import Displayed
from lenskit.concepts import Concept, choose_concepts, concepts, load_concept_file, spread
from lenskit.generation import SteeringRow, generate_steered
from lenskit.models import EMBEDDED, load_model
from lenskit.scoring import (
    Judge,
    as_verdict,
    file_judge,
    grammar_judge,
    likelihood_judge,
    phrase_judge,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class Subject(Displayed):
    """A model, a concept and a judge, and what goes with them.

    ``classes``: the concepts that ``concept`` may be compared with, by class. ``statements``: those
    that prompts are made of, or None for lenskit's own. ``exact``: the model speaks the embedded
    grammar and the concept is one of it, so the truth is known.
    """

    model: TransformerBridge = field(repr=False)
    concept: Concept
    judge: Judge = field(repr=False)
    judged_by: str
    exact: bool
    classes: Mapping[str, tuple[Concept, ...]] = field(repr=False)
    statements: tuple[str, ...] | None = field(repr=False)

    def some(self, per_class: int) -> dict[str, list[Concept]]:
        """At most so many concepts of each class, evenly spaced; the concept itself first."""
        own = self.concept.concept_class or "custom"
        found = {}
        for name in (own, *(one for one in self.classes if one != own)):
            members = list(self.classes[name])
            number = min(per_class, len(members))
            few = [members[i * len(members) // number] for i in range(number)]
            rest = [one for one in few if one != self.concept]
            found[name] = [self.concept, *rest][:number] if name == own else few
        return found

    def _rows(self) -> dict[str, object]:
        return {"model": self._model_name} | super()._rows()

    @property
    def _model_name(self) -> str:
        return Path(str(self.model.cfg.model_name)).name

    def __str__(self) -> str:
        name = f"{self.concept.concept_class or 'custom'}/{self.concept.name}"
        truth = "the truth is known" if self.exact else "no ground truth"
        return f"{self._model_name}; {name}; judged by {self.judged_by}; {truth}"


def subject(model: str = EMBEDDED, concept: str = "fears/spiders", judge: str = "auto") -> Subject:
    """The subject that a notebook's first cell names.

    ``model``: a folder or hub id. ``concept``: "fears/spiders" of the embedded grammar, or a file
    of one's own (``load_concept_file``), of which "file.toml:name" picks one. ``judge``:
    "grammar", "likelihood", or phrases such as "web, eight legs"; "auto" is the file's own, the
    grammar where the model speaks it, or else the likelihoods of the model itself. Raises
    ValueError for "grammar" where the model does not speak it.

    >>> print(lk.subject(concept="fears/bees", judge="bee, sting"))
    lenskit-mini; fears/bees; judged by phrases (bee, sting); the truth is known
    """
    loaded = load_model(model)
    path, _, name = concept.partition(".toml")
    file = load_concept_file(Path(path + ".toml")) if concept != path else None
    if file is None:
        (chosen,) = choose_concepts([concept])
        known = {one: tuple(spread(one, None)) for one in concepts}
    else:
        chosen = file[name.lstrip(":")] if name else next(iter(file.values()))
        known = {}
        for one in file.values():
            known[one.concept_class or "custom"] = (
                *known.get(one.concept_class or "custom", ()),
                one,
            )
    exact = file is None and _speaks_grammar(loaded, chosen)
    if judge == "grammar" and not exact:
        raise ValueError(
            f"judge 'grammar' needs a concept of the embedded grammar and a model that speaks it; "
            f"{model} with {concept} is not so. 'likelihood' or phrases would work"
        )
    found: Judge
    if judge == "auto" and file is not None:
        judge, found = f"the file ({file.judge})", file_judge(file, loaded)
    elif judge == "grammar" or (judge == "auto" and exact):
        judge, found = "the grammar", grammar_judge
    elif judge in ("auto", "likelihood"):
        judge, found = "the model's own likelihoods", likelihood_judge(loaded)
    else:
        found = phrase_judge([one.strip() for one in judge.split(",")])
        judge = f"phrases ({judge})"
    statements = file.statements or None if file is not None else None
    return Subject(loaded, chosen, found, judge, exact, known, statements)


def _speaks_grammar(model: TransformerBridge, concept: Concept) -> bool:
    rows = [SteeringRow(question, None, 0.0, concept.prefix) for question in concept.questions]
    answers = generate_steered(model, rows, max_new_tokens=50)
    verdicts = [
        as_verdict(grammar_judge(concept, str(row.question), answer))
        for row, answer in zip(rows, answers, strict=True)
    ]
    return any(verdict.score for verdict in verdicts)
