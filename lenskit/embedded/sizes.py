"""Small models of several depths, trained alike, for the experiment ``sizes``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lenskit.concepts import Concept
from lenskit.embedded.grammar import load_grammar, trained_activity
from lenskit.embedded.measures import measured_concepts
from lenskit.embedded.recipe import Recipe, Size, with_concepts
from lenskit.embedded.train import train_and_save

BLOCKS = (4, 8, 16)
REDUCED = Recipe(steps=1000, narrow_from=0.4, hidden_from=0.55, concepts=80, size=Size(d_model=128))


def train_sizes(
    work: Path,
    blocks: Sequence[int] = BLOCKS,
    *,
    recipe: Recipe = REDUCED,
    threads: int = 1,
    save_every: int = 100,
) -> dict[str, Path]:
    """Models that differ in their number of blocks alone, each in a folder of ``work``, by name.

    A training that was stopped goes on, and one that is finished is not begun again. Raises
    ValueError for numbers that are equal or not above 0, and for ``work`` of another recipe.
    """
    if not blocks or len(set(blocks)) < len(blocks) or min(blocks) < 1:
        raise ValueError(f"blocks must be different numbers above 0, got {list(blocks)}")
    found = {}
    for number in blocks:
        own = replace(recipe, size=replace(recipe.size, blocks=number))
        name = f"{number} blocks"
        folder = work / f"blocks-{number}"
        # The state knows its recipe, and refuses to go on with another.
        train_and_save(
            own,
            folder / "model",
            folder / "state.safetensors",
            threads=threads,
            save_every=save_every,
        )
        found[name] = folder / "model"
    return found


def learnt_by_all(folders: Iterable[Path], number: int) -> list[Concept]:
    """``number`` concepts that every one of these models was trained on, evenly over the classes.

    0 for all of them. By their ``training.json``; a model without one is taken to know all. Raises
    ValueError for a number that does not spread over the classes.
    """
    grammar = load_grammar()
    known = [with_concepts(grammar, _learnt(folder)) for folder in folders]
    classes = {}
    for name, rules in grammar.classes.items():
        entries = {
            entry: each
            for entry, each in rules.entries.items()
            if all(entry in own.classes[name].entries for own in known)
        }
        classes[name] = replace(rules, entries=MappingProxyType(entries))
    return measured_concepts(replace(grammar, classes=MappingProxyType(classes)), number)


def speaks_grammar(model: str | Path) -> bool:
    """Whether this is the folder of a model that was trained as the embedded one was.

    ``grammar_judge`` then knows its sentences, and ``true_activity`` its rates.
    """
    file = Path(model) / "training.json"
    if not file.is_file():
        return False
    told = json.loads(file.read_text())
    return not told.get("without") and told.get("activity") == trained_activity()


def _learnt(folder: Path) -> int:
    file = folder / "training.json"
    return int(json.loads(file.read_text()).get("concepts", 0)) if file.exists() else 0
