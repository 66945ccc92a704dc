"""A study on several GPUs: Ray starts a process for each, and the study's folder joins them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from lenskit._progress import Bars
from lenskit.concepts import Concept
from lenskit.study.files import distinct, finished, read_study
from lenskit.study.run import run_study
from lenskit.study.study import Study
from lenskit.study.ways import Variant, settings_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def run_on_workers(
    load: Callable[[], TransformerBridge],
    concepts: Iterable[Concept] | Concept,
    variants: Sequence[Variant] | Variant | None = None,
    *,
    out: str | Path,
    workers: int | None = None,
    gpus: float | None = None,
    progress: bool = True,
    **options: Any,
) -> Study:
    """``run_study`` with concepts handed to ``workers`` processes as they become free.

    Each worker calls ``load()`` once and sees ``gpus`` GPUs of its own (a fraction shares one; 2
    are for a model spread over two): by default one, or none where Ray finds none. ``workers``: by
    default as many as that allows, one for each core without GPUs. ``out`` must be a folder that
    all of them see; it is that of ``run_study``, so a study begun by one is finished by the other,
    and the result is the same. A Ray cluster that is connected is used, else one is started on
    this machine and ended afterwards.

    Raises ``ImportError`` without Ray, ``ValueError`` where Ray has too few GPUs or cores and for
    concepts as ``run_study``, and whatever a worker raises.

    >>> fears = list(lk.concepts["fears"].values())
    >>> study = lk.run_on_workers(lk.load_model, fears, out="fears", workers=4)  # doctest: +SKIP
    """
    concepts = distinct(concepts)
    variants, options = settings_of(variants, options)
    folder = Path(out).resolve()
    done = finished(folder, concepts)
    # With nothing to do, one worker still checks that the folder is of this study.
    waiting = [concept for concept in concepts if concept not in done] or concepts[:1]
    with _cluster() as ray:
        found = ray.cluster_resources()
        gpus = min(1.0, found.get("GPU", 0)) if gpus is None else gpus
        room = int(found.get("GPU", 0) / gpus) if gpus else int(found.get("CPU", 1))
        number = room if workers is None else workers
        if not 1 <= number <= room:
            raise ValueError(
                f"workers={workers} with gpus={gpus:g} each does not fit: Ray finds "
                f"{found.get('CPU', 0):g} cores and {found.get('GPU', 0):g} GPUs, "
                f"so 1 to {room} workers would"
            )
        actor = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus)(_Worker)
        pool = [
            actor.remote(load, variants, folder, options) for _ in range(min(number, len(waiting)))
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bars(*columns, TimeRemainingColumn(), disable=not progress) as bar:
            task = bar.add_task(
                f"study, {len(pool)} workers",
                total=len(concepts),
                completed=len(concepts) - len(waiting),
            )
            for _ in _unordered(ray, pool, waiting):
                bar.advance(task)
    return read_study(folder, concepts)


class _Worker:
    """A process that keeps its model between concepts."""

    def __init__(
        self, load: Callable, variants: Sequence[Variant], out: Path, options: dict
    ) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.model, self.variants, self.out, self.options = load(), variants, out, options

    def run(self, concept: Concept) -> None:
        run_study(
            self.model, [concept], self.variants, out=self.out, progress=False, **self.options
        )


def _unordered(ray: Any, pool: Sequence[Any], concepts: Sequence[Concept]) -> Iterator[None]:
    """Yield whenever a concept is done; each worker has one at a time."""
    left = list(reversed(concepts))
    busy = {worker.run.remote(left.pop()): worker for worker in pool}
    while busy:
        done, _ = ray.wait(list(busy), num_returns=1)
        worker = busy.pop(done[0])
        ray.get(done[0])
        if left:
            busy[worker.run.remote(left.pop())] = worker
        yield


@contextmanager
def _cluster() -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("workers need Ray: pip install 'lenskit[ray]'") from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
