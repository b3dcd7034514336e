"""SIGTERM: a moment to save, a second one to end at once, and the word to workers that see no signals."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store
from stages.artifacts.lease import Fence
from stages.job.stopping import StopNotice, Stopped, grace_seconds, postponing, raise_stopped


@pytest.fixture(autouse=True)
def a_job(monkeypatch: pytest.MonkeyPatch):
    """The handler that a job has outside of training."""
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    before = signal.signal(signal.SIGTERM, raise_stopped)
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def trained(*signals_and_pauses: float | None, told: list[str] | None = None) -> None:
    """Training that gets a signal for every None and takes the given seconds otherwise."""
    told = told if told is not None else []
    with postponing(lambda: told.append("save")):
        for pause in signals_and_pauses:
            time.sleep(pause) if pause is not None else sigterm()
        told.append("saved")


def test_training_goes_on_after_the_signal_and_the_job_ends_when_it_is_done() -> None:
    told: list[str] = []
    with pytest.raises(Stopped):
        trained(None, told=told)
    assert told == ["save", "saved"]


def test_a_second_signal_ends_at_once() -> None:
    told: list[str] = []
    with pytest.raises(Stopped):
        trained(None, None, told=told)
    assert told == ["save"]


def test_a_step_that_outlasts_the_grace_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "1.6")
    started = time.monotonic()
    with pytest.raises(Stopped):
        trained(None, 30.0)
    assert 0.5 <= time.monotonic() - started < 10


def test_after_training_a_signal_ends_the_job_as_before() -> None:
    trained(0.0)
    with pytest.raises(Stopped):
        sigterm()


def test_no_late_signal_disturbs_the_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "1.6")
    with pytest.raises(Stopped):
        trained(None)
    time.sleep(1)


def test_the_grace_leaves_a_second_of_the_time_that_ray_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("", 2.0), ("30", 29.0), ("1", 0.5)):
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", given)
        assert grace_seconds() == expected


def test_the_word_reaches_the_workers_of_this_attempt_and_not_those_of_the_next(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    first, second = (Fence(kind="sft-model", fingerprint="f" * 64, number=n, token=str(n)) for n in (1, 2))
    flag, later = threading.Event(), threading.Event()
    with StopNotice(store, first).watched(flag):
        assert not flag.wait(0.7)
        StopNotice(store, first).give()
        assert flag.wait(10)
    with StopNotice(store, second).watched(later):
        assert not later.wait(1.2)
