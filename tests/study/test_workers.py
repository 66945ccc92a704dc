from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from lenskit.concepts import concepts
from lenskit.models import load_model
from lenskit.study import run_on_workers, run_study, variants

CHOSEN = (concepts["fears"]["spiders"], concepts["moods"]["cheerful"])
WAYS = variants(learners=("mean difference",), labels=("hard",), controls=("unsteered",))
OPTIONS = {"coefficients": (0.05,), "prompts": 24, "max_new_tokens": 8}
load = partial(load_model, check=False)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def load_or_die(tmp_path):
    """Kills the first worker that loads."""
    once = str(tmp_path / "once")

    def load_or_die():
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return load()
        os.kill(os.getpid(), signal.SIGKILL)

    return load_or_die


@pytest.fixture(scope="module")
def alone():
    return run_study(load(), CHOSEN, WAYS, progress=False, **OPTIONS).answers


@pytest.mark.slow
def test_processes_finish_what_one_began_though_one_is_killed(tmp_path, load_or_die, alone):
    settings = {"out": tmp_path / "out", "progress": False, **OPTIONS}
    run_study(load(), CHOSEN[:1], WAYS, **settings)
    shared = run_on_workers(load_or_die, CHOSEN, WAYS, workers=1, ray=False, **settings).answers
    assert (tmp_path / "once").exists() and shared.equals(alone)


@pytest.mark.slow
def test_ray_finishes_what_one_began_though_an_actor_is_killed(
    cluster, tmp_path, load_or_die, alone
):
    settings = {"out": tmp_path / "out", "progress": False, **OPTIONS}
    run_study(load(), CHOSEN[:1], WAYS, **settings)
    shared = run_on_workers(load_or_die, CHOSEN, WAYS, **settings).answers
    assert (tmp_path / "once").exists() and shared.equals(alone)
    with pytest.raises(ValueError, match="other settings"):
        run_on_workers(load, CHOSEN, WAYS[:1], workers=1, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "gpus"), [(3, None), (0, None), (1, 1.0)])
def test_more_workers_than_fit_are_refused(cluster, workers, gpus, tmp_path):
    if gpus and cluster.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="does not fit"):
        run_on_workers(load, CHOSEN, WAYS, out=tmp_path, workers=workers, gpus=gpus)


def test_concepts_that_one_process_refuses_are_refused_before_any_worker_starts(tmp_path):
    for given in ((), CHOSEN[:1] * 2):
        with pytest.raises(ValueError, match="at least one, and differ"):
            run_on_workers(load, given, WAYS, out=tmp_path)
