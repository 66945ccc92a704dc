"""Stages and their seconds, by a clock that is told what time it is."""

from __future__ import annotations

import threading

import pytest

from lenskit.study import clock
from lenskit.study.clock import stage, watched


@pytest.fixture
def tick(monkeypatch):
    """Lets time pass."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_what_an_inner_stage_takes_is_not_the_outer_ones_too(tick):
    with watched() as seconds:
        with stage("fit"):
            tick(1)
            with stage("capture"):
                tick(4)
                with stage("labels"):
                    tick(2)
            tick(3)
        with stage("capture"):
            tick(5)
    assert seconds == {"labels": 2, "capture": 9, "fit": 4}


def test_a_stage_that_fails_is_counted_and_nobody_watching_is_no_error(tick):
    with watched() as seconds:
        with pytest.raises(ValueError), stage("fit"):
            tick(2)
            raise ValueError
        with stage("answers"):
            tick(1)
    with stage("fit"):
        tick(7)
    assert seconds == {"fit": 2, "answers": 1}


def test_two_threads_do_not_count_each_others_stages(tick):
    found = []

    def other() -> None:
        with watched() as seconds:
            with stage("fit"):
                tick(1)
            found.append(dict(seconds))

    with watched() as seconds:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [{"fit": 1}] and seconds == {}
