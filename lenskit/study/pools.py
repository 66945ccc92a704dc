"""Workers: processes of this machine, or actors of Ray on many, both with one model each."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
from threadpoolctl import threadpool_limits
from transformer_lens.model_bridge import TransformerBridge

from lenskit.study.clock import stage, watched
from lenskit.study.engine import Compute, Died, Failure, Finished, Group, Here, Pool, computed


class _Host:
    """What runs in a worker: it loads once, and computes the groups that it is given.

    Everything goes in and out pickled by cloudpickle, which takes functions of a notebook too.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._loaded: list[Any] = []

    def run(self, group: bytes) -> bytes:
        """The results, or the exception that ``load`` raised."""
        loading: dict[str, float] = {}
        if not self._loaded:
            load, self._compute = cloudpickle.loads(self._payload)
            try:
                with watched() as loading, stage("loading"):
                    self._loaded.append(load())
            except Exception as error:
                return cloudpickle.dumps(_portable(error))
        found = computed(self._compute, self._loaded[0], cloudpickle.loads(group))
        ready = {
            key: Failure(_portable(one.error)) if isinstance(one, Failure) else one
            for key, one in found.results.items()
        }
        return cloudpickle.dumps(Finished(ready, {**loading, **found.seconds}))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be pickled and back."""
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(Failure(error).reason)
    return error


def _opened(data: bytes) -> Finished:
    found = cloudpickle.loads(data)
    if isinstance(found, Exception):
        raise found
    return found


class Process:
    """A process of this machine, started anew so that it shares no state with this one."""

    def __init__(self, payload: bytes, threads: int, devices: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.devices = devices
        self.process = context.Process(
            target=_serve, args=(other, payload, threads, devices), daemon=True
        )
        self.process.start()
        other.close()

    def give(self, group: Group) -> None:
        try:
            self.pipe.send_bytes(cloudpickle.dumps(group))
        except OSError:
            pass  # it is dead, as waiting for it will show

    def answer(self) -> Finished | Died:
        """What it said; it must have said something or ended."""
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return Died(how)
        return _opened(data)

    def end(self) -> None:
        """Kill it if it lives."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Processes:
    """A pool of processes of this machine; Ctrl-C is for the first process, which ends them.

    ``devices``: the value of CUDA_VISIBLE_DEVICES for each worker; by default as it is here. In a
    script, what starts them must stand under ``if __name__ == "__main__":``, as ever with spawned
    processes.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        compute: Compute,
        size: int,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.size = size
        self._payload = cloudpickle.dumps((load, compute))
        self._threads = max(1, torch.get_num_threads() // size)
        self._free: list[str | None] = list(reversed(devices)) if devices else [None] * size
        self._workers: list[Process] = []
        self.idle: list[Process] = []

    def start(self) -> Process:
        # At the first all of them, since what they import takes longer than a first group may.
        self.idle += [self._spawned() for _ in range(0 if self._workers else self.size - 1)]
        return self._spawned()

    def _spawned(self) -> Process:
        worker = Process(self._payload, self._threads, self._free.pop())
        self._workers.append(worker)
        return worker

    def wait(self, busy: Sequence[Process]) -> tuple[Process, Finished | Died]:
        # The pipe of a process that ended is ready too: at its end.
        ready = wait([worker.pipe for worker in busy])
        worker = next(worker for worker in busy if worker.pipe in ready)
        outcome = worker.answer()
        if isinstance(outcome, Died):
            worker.end()
            self._workers.remove(worker)
            self._free.append(worker.devices)
        return worker, outcome

    def close(self) -> None:
        while self._workers:
            self._workers.pop().end()


def _serve(pipe: Connection, payload: bytes, threads: int, devices: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    host = _Host(payload)
    try:
        while True:
            pipe.send_bytes(host.run(pipe.recv_bytes()))
    except (EOFError, OSError):
        pass  # the first process has ended


class Actor:
    """A worker of Ray's, with its part of the cluster."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def give(self, group: Group) -> None:
        self.answer = self.handle.run.remote(cloudpickle.dumps(group))


class Actors:
    """A pool of Ray's actors, each with ``gpus`` GPUs, or one core where that is 0."""

    def __init__(
        self, ray: Any, load: Callable[[], Any], compute: Compute, size: int, gpus: float
    ) -> None:
        self.size = size
        self._ray = ray
        self._payload = cloudpickle.dumps((load, compute))
        self._kind = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus)(_Host)
        self._workers: list[Actor] = []
        self.idle: list[Actor] = []

    def start(self) -> Actor:
        self._workers.append(Actor(self._kind.remote(self._payload)))
        return self._workers[-1]

    def wait(self, busy: Sequence[Actor]) -> tuple[Actor, Finished | Died]:
        (answer,), _ = self._ray.wait([worker.answer for worker in busy], num_returns=1)
        worker = next(worker for worker in busy if worker.answer == answer)
        try:
            return worker, _opened(self._ray.get(answer))
        # Of its node, its process or its memory; what load and compute raise comes as an answer.
        except self._ray.exceptions.RayError as error:
            self._workers.remove(worker)
            return worker, Died(f"with {type(error).__name__}")

    def close(self) -> None:
        while self._workers:
            self._ray.kill(self._workers.pop().handle)


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Ray, connected to its cluster: the one that there is, or one on this machine for the while.

    Raises ImportError without Ray.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("workers of Ray need it: pip install 'lenskit[ray]'") from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


@contextmanager
def workers_of(
    load: Callable[[], Any],
    compute: Compute,
    workers: int | None = None,
    gpus: float | None = None,
    ray: bool | None = None,
) -> Iterator[Pool]:
    """So many workers, each with what ``load()`` makes: arguments as in ``run_on_workers``.

    Raises ValueError where there are too few GPUs or cores, and ImportError without Ray.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    on_ray = connected or bool(os.environ.get("RAY_ADDRESS")) if ray is None else ray
    make = _actors if on_ray else _processes
    with make(load, compute, workers, gpus) as pool:
        yield pool


@contextmanager
def pool_of(
    model: TransformerBridge | Callable[[], TransformerBridge],
    compute: Compute,
    workers: int | None = None,
    gpus: float | None = None,
    ray: bool | None = None,
) -> Iterator[Pool]:
    """This process with a model that is loaded, or workers with a function that loads one each.

    Raises ValueError for workers and a model that is loaded, and what ``workers_of`` raises.
    """
    if not isinstance(model, TransformerBridge):
        with workers_of(model, compute, workers, gpus, ray) as pool:
            yield pool
        return
    if (workers or 1) != 1 or gpus is not None or ray:
        raise ValueError(
            f"workers={workers}, gpus={gpus}, ray={ray}: workers load a model each, so give a "
            "function that loads it, such as partial(lk.load_model, path), in place of the model"
        )
    with closing(Here(lambda: model, compute)) as here:
        yield here


@contextmanager
def _processes(
    load: Callable[[], Any], compute: Compute, workers: int | None, gpus: float | None
) -> Iterator[Pool]:
    """Processes of this machine, each with its GPUs or a share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    there = torch.cuda.device_count()
    number, gpus = _number(workers, gpus, cores or 1, there, "this machine has")
    devices = None
    if gpus:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
        each = names.split(",")
        devices = [
            ",".join(each[int(i * gpus) : int(i * gpus) + math.ceil(gpus)]) for i in range(number)
        ]
    with closing(Processes(load, compute, number, devices)) as pool:
        yield pool


@contextmanager
def _actors(
    load: Callable[[], Any], compute: Compute, workers: int | None, gpus: float | None
) -> Iterator[Pool]:
    with ray_cluster() as ray:
        found = ray.cluster_resources()
        cores, there = int(found.get("CPU", 1)), int(found.get("GPU", 0))
        number, gpus = _number(workers, gpus, cores, there, "Ray finds")
        with closing(Actors(ray, load, compute, number, gpus)) as pool:
            yield pool


def _number(
    workers: int | None, gpus: float | None, cores: int, there: int, whose: str
) -> tuple[int, float]:
    """How many workers, and GPUs for each."""
    gpus = min(1.0, there) if gpus is None else gpus
    room = int(there / gpus) if gpus else cores
    number = room if workers is None else workers
    if not 1 <= number <= room:
        raise ValueError(
            f"workers={workers} with gpus={gpus:g} each does not fit: {whose} {cores} cores and "
            f"{there} GPUs, so 1 to {room} workers would"
        )
    return number, gpus
