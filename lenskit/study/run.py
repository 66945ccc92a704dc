"""The whole method over many concepts, in a folder from which a stopped study goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenskit.concepts import Concept
from lenskit.models import model_fingerprint
from lenskit.scoring import check_grammar_judge, grammar_judge
from lenskit.study.answers import Cell, Settings, cell_key, check_concept, studied
from lenskit.study.bench import Workbench, looked, open_recipe
from lenskit.study.cells import SETTINGS, CellStore, Key, Row
from lenskit.study.engine import CellsFailed, Here, Pool, Results, run_cells
from lenskit.study.look import settled
from lenskit.study.pools import workers_of
from lenskit.study.study import Study
from lenskit.study.tables import table_of
from lenskit.study.ways import Variant, warn_of_silence

# Workers get so many groups each, so that none waits long for the last of another.
_GROUPS_EACH = 4
_MODEL: Key = ("model",)
_LOOK = "look"
# At how many concepts, and prompts of each, a study looks that settles its recipe.
_LOOKED, _PROMPTS = 6, 64


def run_study(
    model: TransformerBridge,
    concepts: Iterable[Concept] | Concept,
    variants: Sequence[Variant] | Variant | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Study:
    """Vectors of every variant for every concept, their answers over coefficients, judged.

    Variants, ``coefficients``, whether these are ``relative``, and ``learners`` are the
    ``recipe``'s where they are not given (``lk.recipes``). A token or blocks that are to be looked
    for (``recipe="lenskit"``) are settled once, on up to six of the concepts. ``prompts``: how many
    for a concept (400). ``statements``: those of the prompts, where they are not the grammar's;
    fewer than ``prompts`` make as many prompts. ``judge``: ``(concept, question, answer)`` -> a
    Verdict, a bool, or a number from 0 to 1; by default that of the embedded grammar.
    ``max_new_tokens`` (50) of an answer, ``batch_size`` (256) answers at once, ``seed`` (0).

    With ``out`` what is finished is kept in that folder, and a study that was stopped, or killed
    at any point, goes on from there and ends with the same table. A judge and learners are known
    by their code and what they hold (see ``lenskit.study.identity``), so that a folder never mixes
    the scores of two; a judge may say itself what identifies it.

    Raises ValueError when the folder belongs to a study with other settings or model, when two
    concepts share class and name, or have fewer than three questions, and where the grammar judge
    meets a concept or a model that does not speak the grammar; CellsFailed at the end where single
    cells failed: the others are kept. Warns where the prompted control hardly ever shows the
    concept, so that no score below it can be trusted.

    >>> options = {"coefficients": (0.03, 0.06), "prompts": 40, "max_new_tokens": 3}
    >>> way = lk.Variant(learner="ridge")
    >>> study = lk.run_study(model, concept, way, progress=False, **options)
    >>> study.compare()["learner"].tolist()
    ['ridge']
    """
    asked = _asked(concepts, variants, options)
    with closing(Here(lambda: model, partial(_compute, asked.settings))) as pool:
        return _run(asked, pool, out, progress)


def run_on_workers(
    load: Callable[[], TransformerBridge],
    concepts: Iterable[Concept] | Concept,
    variants: Sequence[Variant] | Variant | None = None,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    ray: bool | None = None,
    progress: bool = True,
    **options: Any,
) -> Study:
    """``run_study`` on ``workers`` processes, each with a model of its own from ``load()``.

    Each worker sees ``gpus`` GPUs of its own (a fraction shares one; 2 are for a model spread over
    two): by default one, or none where there is none. ``workers``: by default as many as that
    allows, one for each core without GPUs. They are processes of this machine, or with ``ray``
    actors on a Ray cluster: the one that is connected, or else one started here for the while. By
    default Ray is used where it is connected already or ``RAY_ADDRESS`` is set.

    The folder and the result are those of ``run_study``, so a study begun by one is finished by
    the other. Only this process writes. What a worker that dies had in hand goes to another. In a
    script, call it under ``if __name__ == "__main__":``, since processes are spawned.

    Raises ``ImportError`` without Ray, ``ValueError`` where there are too few GPUs or cores,
    whatever ``load`` raises, and what ``run_study`` raises.

    >>> fears = list(lk.concepts["fears"].values())
    >>> study = lk.run_on_workers(lk.load_model, fears, out="fears", workers=4)  # doctest: +SKIP
    """
    asked = _asked(concepts, variants, options)
    with workers_of(load, partial(_compute, asked.settings), workers, gpus, ray) as pool:
        return _run(asked, pool, out, progress)


def distinct(concepts: Iterable[Concept] | Concept) -> list[Concept]:
    """The concepts of a study; raises ValueError for none, or two of the same class and name.

    A class of concepts stands for its members; no class at all is the class "custom".
    """
    if isinstance(concepts, Mapping):
        concepts = concepts.values()
    concepts = [concepts] if isinstance(concepts, Concept) else list(concepts)
    if wrong := [one for one in concepts if not isinstance(one, Concept)]:
        raise TypeError(f"concepts must be Concepts, or one of them; got {wrong[0]!r}")
    names = [(c.concept_class or "custom", c.name) for c in concepts]
    if not concepts or len(set(names)) < len(names):
        raise ValueError(f"concepts must be at least one, and differ in class or name: {names}")
    return concepts


def finished(out: str | Path, concepts: Iterable[Concept]) -> list[Concept]:
    """Those concepts of which the folder ``out`` holds every variant of its study."""
    if not (Path(out) / SETTINGS).is_file():
        return []
    store, ways = _opened(out)
    return [c for c in concepts if all(cell_key(c, way) in store.cells for way in ways)]


def read_study(out: str | Path, concepts: Iterable[Concept]) -> Study:
    """The finished study of these concepts that the folder ``out`` holds.

    Raises ValueError where a concept is still to be done, and says which lines are damaged.

    >>> import tempfile
    >>> options = {"coefficients": 0.04, "prompts": 40, "max_new_tokens": 3, "progress": False}
    >>> out = tempfile.mkdtemp()
    >>> done = lk.run_study(model, concept, lk.Variant(), out=out, **options)
    >>> len(lk.read_study(out, [concept]).answers) == len(done.answers)
    True
    """
    concepts = list(concepts)
    store, ways = _opened(out)
    keys = {c.name: [cell_key(c, way) for way in ways] for c in concepts}
    left = [name for name, own in keys.items() if not all(key in store.cells for key in own)]
    if left:
        damaged = f" ({'; '.join(store.damaged)})" if store.damaged else ""
        raise ValueError(f"out={str(out)!r} does not hold {', '.join(left)} yet{damaged}")
    return _study(store, [cell_key(c, way) for c in concepts for way in ways])


@dataclass(frozen=True)
class _Asked:
    """A study that is to be run, checked before anything is computed or written."""

    concepts: tuple[Concept, ...]
    variants: tuple[Variant, ...]
    settings: Settings

    @property
    def cells(self) -> dict[Key, Cell]:
        pairs = ((concept, way) for concept in self.concepts for way in self.variants)
        return {cell_key(*pair): pair for pair in pairs}

    def looks(self) -> list[dict[Key, Cell]]:
        """Each variant that waits for a look, and each of the concepts that are looked at."""
        number, open_ones = len(self.concepts), self._open
        some = [self.concepts[i * number // _LOOKED] for i in range(_LOOKED)]
        some = some if number > _LOOKED else [*self.concepts]
        return [{(_LOOK, *cell_key(one, way)): (one, way)} for way in open_ones for one in some]

    @property
    def _open(self) -> list[Variant]:
        ways = (replace(way, control="") for way in self.variants if not way.settled)
        return list(dict.fromkeys(ways))

    def settled(self, cells: Mapping[Key, Sequence[Row]]) -> _Asked:
        """With the token and blocks that are chosen by the looks among these cells."""
        found = {}
        for own in self._open:
            looks = [
                (one.name, pd.DataFrame(cells[key]))
                for group in self.looks()
                for key, (one, way) in group.items()
                if way == own
            ]
            names, tables = zip(*looks, strict=True)
            recipe = open_recipe(own, self.settings.recipe)
            found[own] = settled(recipe, tables, names).recipe

        def chosen(way: Variant) -> Variant:
            recipe = found.get(replace(way, control=""))
            return replace(way, token=recipe.token, blocks=recipe.blocks) if recipe else way

        return replace(self, variants=tuple(dict.fromkeys(map(chosen, self.variants))))

    def groups(self, workers: int) -> list[dict[Key, Cell]]:
        """So many concepts together as fill a batch; the same in every run with the same workers,
        so that what a resumed one computes has the batches that it would have had.
        """
        rows = sum(
            1 if way.still else len(self.settings.coefficients) for way in self.variants
        ) * max(len(concept.questions) for concept in self.concepts)
        many = max(1, self.settings.batch_size // rows)
        if workers > 1:
            many = min(many, math.ceil(len(self.concepts) / (_GROUPS_EACH * workers)))
        parts = (self.concepts[i : i + many] for i in range(0, len(self.concepts), many))
        return [
            {cell_key(one, way): (one, way) for one in part for way in self.variants}
            for part in parts
        ]


def _asked(
    concepts: Iterable[Concept] | Concept,
    variants: Sequence[Variant] | Variant | None,
    options: Mapping[str, Any],
) -> _Asked:
    chosen = distinct(concepts)
    for concept in chosen:
        check_concept(concept)
    ways, settings = Settings.of(variants, options)
    return _Asked(tuple(chosen), ways, settings)


def _run(asked: _Asked, pool: Pool, out: str | Path | None, progress: bool) -> Study:
    said = CellStore(None, {})
    try:
        # This process may have no model, so a worker says which one it is, and whether it will do.
        first = run_cells([{_MODEL: asked}], pool, said, progress=False)
    except CellsFailed as error:
        raise error.failures[_MODEL].error from None
    (about,) = said.cells[_MODEL]
    looks = asked.looks()
    looking = run_cells(looks, pool, said, title="look", progress=progress) if looks else {}
    asked = asked.settled(said.cells)
    settings = {
        "model": about["model"],
        "variants": [asdict(way) for way in asked.variants],
        "options": asked.settings.described(),
    }
    store = CellStore(out, settings)
    groups = asked.groups(pool.size)
    spent = run_cells(groups, pool, store, score=_held_out, title="study", progress=progress)
    warn_of_silence([row for key in asked.cells for row in store.cells[key]])
    return replace(_study(store, list(asked.cells)), seconds=_sum(first, looking, spent))


def _compute(settings: Settings, model: TransformerBridge, group: Mapping[Key, Any]) -> Results:
    if _MODEL in group:
        asked = group[_MODEL]
        if settings.judge is grammar_judge:
            check_grammar_judge(model, asked.concepts)
        return {_MODEL: [{"model": model_fingerprint(model)}]}
    if all(key[0] == _LOOK for key in group):
        return {key: _looked(settings, model, *cell) for key, cell in group.items()}
    return studied(settings, model, group)


def _looked(
    settings: Settings, model: TransformerBridge, concept: Concept, way: Variant
) -> list[Row]:
    bench = Workbench(
        model,
        concept,
        min(settings.prompts, _PROMPTS),
        settings.seed,
        settings.learners,
        settings.recipe,
        settings.statements,
    )
    return looked(way, bench).to_dict("records")


def _opened(out: str | Path) -> tuple[CellStore, list[Variant]]:
    store = CellStore.existing(out)
    try:
        return store, [Variant(**way) for way in store.settings["variants"]]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(out) / SETTINGS} is not that of a study: {error}") from error


def _study(store: CellStore, keys: Sequence[Key]) -> Study:
    return Study(table_of([row for key in keys for row in store.cells[key]]))


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _held_out(rows: Sequence[Row]) -> float | None:
    """The steerability of a cell that is no control."""
    if rows[0]["control"]:
        return None
    return float(Study(pd.DataFrame(rows)).concepts["held_out"].iloc[0])
