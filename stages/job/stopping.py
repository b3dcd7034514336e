"""A job that is asked to end (SIGTERM) gets a moment to save: training checks at every step boundary.

Surprising: with Ray Train workers the signal reaches the job's own process, which does not train, and Ray kills the
workers without notice as soon as that process has ended. So the job stays and passes the request on through the object
store: it writes a key next to its lease, which rank 0 polls.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from stages.artifacts.lease import Fence
from stages.artifacts.store import Store
from stages.config.errors import Category, StageError

logger = logging.getLogger("athanor")

_CLEANUP_SECONDS = 1.0
"""Reserved for what follows saving: failure.json, the end of the MLflow run, the release of the lease."""
_POLL_SECONDS = 0.5


class Stopped(StageError):
    """The job was asked to stop (SIGTERM): preempted, or stopped by a user."""

    category = Category.PREEMPTED


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    """The signal handler of a job that has nothing to save."""
    raise Stopped(
        "the job was asked to stop (SIGTERM)",
        advice="Unless it was stopped on purpose, the retry resumes from the checkpoint.",
    )


def grace_seconds() -> float:
    """Time to save: Ray kills a job `RAY_JOB_STOP_WAIT_TIME_S` (default 3) seconds after SIGTERM, so the job must have
    ended by then."""
    return max(0.5, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or 3) - _CLEANUP_SECONDS)


@contextmanager
def postponing(notice: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM calls `notice`; Stopped is raised when the grace is over, at a second SIGTERM, or at the end of
    the block. Main thread only: no other may install signal handlers."""
    asked = threading.Event()
    deadline = threading.Timer(grace_seconds(), os.kill, (os.getpid(), signal.SIGTERM))
    deadline.daemon = True

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise_stopped(signum, frame)
        asked.set()
        deadline.start()
        notice()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        deadline.cancel()
    if asked.is_set():
        raise_stopped(signal.SIGTERM, None)


class StopNotice:
    """The request to stop that a job passes on to its workers. A new attempt has a new lease, so it does not see old
    requests."""

    def __init__(self, store: Store, fence: Fence) -> None:
        self._store, self._key = store, f"leases/{fence.fingerprint}/{fence.number}.stop"

    def give(self) -> None:
        self._store.write_bytes(self._key, b"save and end\n")

    @contextmanager
    def watched(self, flag: threading.Event) -> Iterator[None]:
        """Set `flag` as soon as the request is there."""
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(flag, ended), name="stop-notice", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, flag: threading.Event, ended: threading.Event) -> None:
        while not ended.wait(_POLL_SECONDS):
            try:
                if self._store.exists(self._key):
                    flag.set()
                    return
            except Exception as error:  # noqa: BLE001 - whatever the store's client raises: the next poll may succeed
                logger.warning("%s could not be checked: %s", self._key, error)
