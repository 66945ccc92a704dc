"""The engine with cells that are numbers: none lost, none doubled, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from lenskit.study import engine, pools
from lenskit.study.cells import CellStore
from lenskit.study.engine import CellsFailed, Died, Failure, Finished, Here, run_cells
from lenskit.study.pools import Actors, Processes

GROUPS = [{(f"g{i}", str(j)): (i, j) for j in range(3)} for i in range(5)]
EXPECTED = {key: [{"score": 10 * i + j}] for g in GROUPS for key, (i, j) in g.items()}


def ten() -> int:
    return 10


def work(factor: int, group: dict) -> dict:
    return {key: [{"score": factor * i + j}] for key, (i, j) in group.items()}


def deadly(once: str | None, factor: int, group: dict) -> dict:
    """Kills its own process at the second group: each time, or only where ``once`` is no file."""
    if ("g1", "0") in group and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return work(factor, group)


def refuse() -> None:
    raise ValueError("there is no model")


def run(store: CellStore, pool, **options) -> dict:
    with closing(pool):
        run_cells(GROUPS, pool, store, progress=False, **options)
    return store.cells


@pytest.fixture
def store() -> CellStore:
    return CellStore(None, {})


def test_every_cell_is_computed_once_here(store):
    loads = []
    assert run(store, Here(lambda: loads.append(1) or 10, work)) == EXPECTED
    assert loads == [1]


def test_what_is_there_is_not_computed_again_and_the_rest_of_its_group_is(tmp_path):
    first = CellStore(tmp_path, {})
    first.add({("g0", "1"): [{"score": 1}], **work(10, GROUPS[2])})
    seen = []

    def counted(factor, group):
        seen.append(list(group))
        return work(factor, group)

    assert run(CellStore(tmp_path, {}), Here(ten, counted)) == EXPECTED
    assert seen == [[("g0", "0"), ("g0", "2")], *(list(GROUPS[i]) for i in (1, 3, 4))]
    run(CellStore(tmp_path, {}), Here(refuse, work))  # nothing to do: nothing is loaded


def test_a_failing_cell_is_reported_and_loses_no_other(store):
    def failing(factor, group):
        found = work(factor, group)
        if ("g3", "0") in group:
            raise KeyError("whole group")
        if ("g1", "1") in group:
            found[("g1", "1")] = Failure(ValueError("only this one"))
            del found[("g1", "2")]
        return found

    with pytest.raises(CellsFailed, match="5 cells failed: ") as caught:
        run(store, Here(ten, failing))
    said = str(caught.value)
    assert "ValueError: only this one (g1, 1)" in said
    assert "LookupError: nothing was returned for it (g1, 2)" in said
    assert "KeyError: 'whole group' (g3, 0 and 2 more)" in said
    lost = set(caught.value.failures)
    assert lost == {("g1", "1"), ("g1", "2"), *GROUPS[3]}
    assert store.cells == {key: rows for key, rows in EXPECTED.items() if key not in lost}
    assert run(store, Here(ten, work)) == EXPECTED


def test_a_fault_that_every_group_has_ends_the_run(store):
    calls = []

    def failing(factor, group):
        calls.append(1)
        raise ValueError("the budget is spent")

    with pytest.raises(CellsFailed, match="9 cells failed, and 6 were not tried after that"):
        run(store, Here(ten, failing))
    assert len(calls) == 3


def test_an_interrupt_keeps_what_is_done(tmp_path):
    def stopped(factor, group):
        if ("g2", "0") in group:
            raise KeyboardInterrupt
        return work(factor, group)

    with pytest.raises(KeyboardInterrupt):
        run(CellStore(tmp_path, {}), Here(ten, stopped))
    kept = CellStore(tmp_path, {}).cells
    assert kept == {k: v for k, v in EXPECTED.items() if k[0] in ("g0", "g1")}


def test_the_mean_score_of_old_and_new_cells_is_shown(store, capsys, monkeypatch):
    shown = []
    update = engine.Bars.update
    monkeypatch.setattr(
        engine.Bars, "update", lambda *a, **k: shown.append(k["score"]) or update(*a, **k)
    )
    store.add(work(10, GROUPS[0]))
    run(store, Here(ten, work), score=lambda rows: rows[0]["score"])
    assert shown[0] == "score 6.000" and shown[-1] == "score 21.000"


@pytest.mark.slow
def test_the_cells_of_a_killed_process_are_done_by_another(tmp_path):
    store, once, factor = CellStore(tmp_path, {}), str(tmp_path / "once"), 10
    # Closures, as in a notebook.
    pool = Processes(lambda: factor, lambda state, group: deadly(once, state, group), 2)
    assert run(store, pool) == EXPECTED
    assert CellStore(tmp_path, {}).cells == EXPECTED
    (file,) = tmp_path.glob("cells-*.jsonl")
    assert file.read_text().count('"g1", "0"') == 1


@pytest.mark.slow
def test_a_group_that_kills_every_process_fails_and_the_others_are_done(store, monkeypatch):
    monkeypatch.setattr(engine, "MOST_DEATHS", 2)
    with pytest.raises(CellsFailed, match="its worker died 2 times, the last by signal 9"):
        run(store, Processes(ten, partial(deadly, None), 1))
    assert store.cells == {k: v for k, v in EXPECTED.items() if k[0] != "g1"}


@pytest.mark.slow
def test_what_a_process_raises_is_what_one_sees(store):
    with pytest.raises(ValueError, match="there is no model"):
        run(store, Processes(refuse, work, 1))

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    def odd(factor, group):
        raise Odd("not", "portable")

    with pytest.raises(CellsFailed, match="Odd: not portable"):
        run(store, Processes(ten, odd, 1))


def test_a_worker_that_cannot_even_start_is_not_replaced_while_others_live(store):
    """On a machine with memory for one model only, the second worker dies whenever it loads."""

    class Pool:
        size, started = 2, 0
        idle: list = []

        def start(self):
            worker = Pool()
            worker.number = self.started
            self.started += 1
            return worker

        def give(self, group):
            self.group = group

        def wait(self, busy):
            worker = max(busy, key=lambda one: one.number)
            return worker, Finished(work(10, worker.group)) if worker.number == 0 else Died(
                "for want"
            )

        def close(self):
            pass

    pool = Pool()
    assert run(store, pool) == EXPECTED
    assert pool.started == 2


def slow(factor: int, group: dict) -> dict:
    time.sleep(0.05)
    return work(factor, group)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_cells(tmp_path):
    counts = []
    for number in range(12):
        if (child := os.fork()) == 0:
            run(CellStore(tmp_path, {}), Here(ten, slow))
            os._exit(0)
        time.sleep(0.02 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = CellStore(tmp_path, {}).cells if (tmp_path / "settings.json").exists() else {}
        assert all(EXPECTED[key] == rows for key, rows in kept.items())
        counts.append(len(kept))
    assert counts == sorted(counts)
    assert run(CellStore(tmp_path, {}), Here(ten, work)) == EXPECTED


class FakeRay:
    """Ray's words in this process: an actor whose method raises Killed dies."""

    class Killed(BaseException):
        pass

    class exceptions:
        class RayError(Exception):
            pass

        class ActorDiedError(RayError):
            pass

    def remote(self, **resources):
        class Kind:
            def __init__(self, host, payload):
                self.host, self.run = host(payload), self

            def remote(self, group):
                try:
                    return [self.host.run(group)]
                except FakeRay.Killed:
                    return [None]

        return lambda host: SimpleNamespace(remote=lambda payload: Kind(host, payload))

    def wait(self, answers, num_returns):
        return answers[-1:], answers[:-1]

    def get(self, answer):
        if answer[0] is None:
            raise self.exceptions.ActorDiedError
        return answer[0]

    def kill(self, actor):
        pass


def test_the_cells_of_a_dead_actor_are_done_by_another(store, monkeypatch):
    deaths = []

    def killed(factor, group):
        if ("g1", "0") in group and deaths.append(1) is None and len(deaths) < 2:
            raise FakeRay.Killed
        return work(factor, group)

    monkeypatch.setattr(pools, "cloudpickle", SimpleNamespace(dumps=lambda x: x, loads=lambda x: x))
    pool = Actors(FakeRay(), ten, killed, 2, 0.5)
    assert run(store, pool) == EXPECTED and len(deaths) == 2
    with pytest.raises(ValueError, match="there is no model"):
        run(CellStore(None, {}), Actors(FakeRay(), refuse, work, 2, 0))
