"""Runs cells, here or on many workers, so that none is lost, doubled, or held up by another.

A *group* is cells that share work: a mapping from their keys to what each of them is of. A
``Compute`` takes what ``load`` made, once for each worker, and a group, and returns the rows of
each cell or the ``Failure`` of those that it could not compute. Only this process writes, so
workers need no common folder. What a killed run leaves is groups that are whole.
"""

from __future__ import annotations

import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from lenskit._progress import Bars
from lenskit.study.cells import CellStore, Key, Row
from lenskit.study.clock import watched

Group: TypeAlias = Mapping[Key, Any]
Results: TypeAlias = "Mapping[Key, Sequence[Row] | Failure]"
Compute: TypeAlias = Callable[[Any, Group], Results]

# A group whose worker died so often is not given to another.
MOST_DEATHS = 3
# So many groups in a row that fail alike end the run: it is not the cells.
MOST_ALIKE = 3


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be computed."""

    error: Exception

    @property
    def reason(self) -> str:
        """The error on one line."""
        return " ".join(f"{type(self.error).__name__}: {self.error}".split())


class CellsFailed(RuntimeError):
    """Some cells could not be computed, for the reasons in ``failures``; the others are kept."""

    def __init__(self, failures: Mapping[Key, Failure], left: int) -> None:
        self.failures = dict(failures)
        reasons = Counter(failure.reason for failure in failures.values())
        first = {failure.reason: key for key, failure in reversed(list(failures.items()))}
        said = [
            f"{reason} ({', '.join(filter(None, first[reason]))}"
            + (f" and {number - 1} more)" if number > 1 else ")")
            for reason, number in reasons.most_common(5)
        ]
        more = [f"{len(reasons) - 5} further reasons"] if len(reasons) > 5 else []
        rest = f", and {left} were not tried after that" if left else ""
        cells = "1 cell" if len(failures) == 1 else f"{len(failures)} cells"
        super().__init__(f"{cells} failed{rest}: {'; '.join([*said, *more])}")


@dataclass(frozen=True)
class Finished:
    """A group's results, and the seconds that each stage of its computation took."""

    results: Results
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Died:
    """A worker that ended in the middle of a group, and how."""

    how: str


class Worker(Protocol):
    """A process, or this one, that computes one group at a time."""

    def give(self, group: Group) -> None: ...


class Pool(Protocol):
    """Workers of one kind: this process, processes of this machine, actors of Ray."""

    size: int
    idle: list[Any]

    def start(self) -> Worker:
        """A further worker, in the place of one that died if there was one."""

    def wait(self, busy: Sequence[Any]) -> tuple[Any, Finished | Died]:
        """One of these workers that is done, and with what; raises what ``load`` raised."""

    def close(self) -> None:
        """End all workers at once."""


class Here:
    """The pool of this process alone."""

    size = 1

    def __init__(self, load: Callable[[], Any], compute: Compute) -> None:
        self._load, self._compute = load, compute
        self.idle: list[Here] = []

    def start(self) -> Here:
        self._state = self._load()
        return self

    def give(self, group: Group) -> None:
        self._group = group

    def wait(self, busy: Sequence[Here]) -> tuple[Here, Finished]:
        return self, computed(self._compute, self._state, self._group)

    def close(self) -> None:
        pass


def computed(compute: Compute, state: Any, group: Group) -> Finished:
    """``compute(state, group)``, with a ``Failure`` for every cell that has no rows."""
    with watched() as seconds:
        try:
            found = compute(state, group)
        except Exception as error:
            found = dict.fromkeys(group, failure(error))
    missing = LookupError("nothing was returned for it")
    return Finished({key: found.get(key, Failure(missing)) for key in group}, seconds)


def failure(error: Exception) -> Failure:
    """The failure with where it arose, which would not go from one process to another."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    return Failure(error)


def run_cells(
    groups: Sequence[Group],
    pool: Pool,
    store: CellStore,
    *,
    score: Callable[[Sequence[Row]], float | None] = lambda rows: None,
    title: str = "cells",
    progress: bool = True,
) -> dict[str, float]:
    """Compute the cells that ``store`` does not hold, and add them to it. The pool stays open.

    A group that is partly there is computed for its other cells. A worker that dies gives its
    group to another; one that dies before its first group is not replaced while others live. The
    progress shows cells done, time left, and the mean ``score`` of the cells so far. Returns the
    seconds that each stage took in this run, of all workers together.

    Raises CellsFailed at the end where cells failed, and before it where ``MOST_ALIKE`` groups in
    a row fail for one reason; whatever ``load`` raises; and what the disk says.
    """
    number = sum(map(len, groups))
    waiting = [
        group
        for given in groups
        if (group := {key: cell for key, cell in given.items() if key not in store.cells})
    ]
    failures: dict[Key, Failure] = {}
    alike: list[str] = []
    seconds: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = (*columns, TimeRemainingColumn(), TextColumn("{task.fields[score]}"))
    with Bars(*shown, disable=not progress) as bar:
        mean = _Mean(score, [store.cells[k] for given in groups for k in given if k in store.cells])
        done = number - sum(map(len, waiting))
        task = bar.add_task(title, total=number, completed=done, score=str(mean))
        try:
            for finished in _scheduled(pool, waiting):
                results = finished.results
                for name, passed in finished.seconds.items():
                    seconds[name] = seconds.get(name, 0.0) + passed
                good = {k: rows for k, rows in results.items() if not isinstance(rows, Failure)}
                bad = {k: one for k, one in results.items() if isinstance(one, Failure)}
                if good:
                    store.add(good)
                failures |= bad
                for rows in good.values():
                    mean.add(rows)
                bar.update(task, advance=len(results), score=str(mean))
                alike = [] if good else [*alike, next(iter(bad.values())).reason][-MOST_ALIKE:]
                if len(alike) == MOST_ALIKE and len(set(alike)) == 1:
                    break
        finally:
            store.close()
    if failures:
        left = sum(k not in store.cells and k not in failures for given in groups for k in given)
        raise CellsFailed(failures, left) from next(iter(failures.values())).error
    return seconds


def _scheduled(pool: Pool, groups: Sequence[Group]) -> Iterator[Finished]:
    """The results of every group, as they come."""
    waiting = deque(range(len(groups)))
    deaths = [0] * len(groups)
    size = pool.size
    busy: dict[Worker, int] = {}
    proved: set[Worker] = set()
    while waiting or busy:
        while waiting and len(busy) < size:
            worker = pool.idle.pop() if pool.idle else pool.start()
            busy[worker] = waiting.popleft()
            worker.give(groups[busy[worker]])
        worker, outcome = pool.wait(list(busy))
        place = busy.pop(worker)
        if not isinstance(outcome, Died):
            proved.add(worker)
            pool.idle.append(worker)
            yield outcome
            continue
        if worker not in proved:
            size = max(1, size - 1)
        deaths[place] += 1
        if deaths[place] < MOST_DEATHS:
            waiting.appendleft(place)
        else:
            error = RuntimeError(f"its worker died {MOST_DEATHS} times, the last {outcome.how}")
            yield Finished(dict.fromkeys(groups[place], Failure(error)))


class _Mean:
    """The mean score of the cells that have one."""

    def __init__(self, score: Callable, cells: Sequence[Sequence[Row]]) -> None:
        self._score, self._sum, self._number = score, 0.0, 0
        for rows in cells:
            self.add(rows)

    def add(self, rows: Sequence[Row]) -> None:
        found = self._score(rows)
        if found is not None:
            self._sum, self._number = self._sum + found, self._number + 1

    def __str__(self) -> str:
        return f"score {self._sum / self._number:.3f}" if self._number else ""
