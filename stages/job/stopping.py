"""A job that is asked to end (SIGTERM) gets a moment to save: training looks at every step boundary.

Surprising: only the main thread of a process sees signals. With Ray Train workers that is the job's own process, which
does not train; Ray kills its workers without a word once it has ended. So it stays, and passes the word on through the
object store: at a key beside its lease, where rank 0 looks.
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

_LAST_WORDS_SECONDS = 1.0
"""For what comes after saving: failure.json, the end of the MLflow run, the release of the lease."""
_LOOK_SECONDS = 0.5


class Stopped(StageError):
    """The job was asked to stop (SIGTERM): preemption, or somebody stopped it."""

    category = Category.PREEMPTED


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    """The signal handler of a job that has nothing to save."""
    raise Stopped(
        "the job was asked to stop (SIGTERM)",
        advice="If nobody stopped it on purpose, the retry resumes from the checkpoint.",
    )


def grace_seconds() -> float:
    """Time to save: Ray kills a job `RAY_JOB_STOP_WAIT_TIME_S` (3) seconds after SIGTERM, and it must end by itself
    before that."""
    return max(0.5, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or 3) - _LAST_WORDS_SECONDS)


@contextmanager
def postponing(notice: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM calls `notice`; the process is stopped when the grace is over, or by a second SIGTERM, or here
    at the end. For a main thread."""
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
    """The word that a job passes on to its workers; a new attempt has a new lease, so an old word does not reach it."""

    def __init__(self, store: Store, fence: Fence) -> None:
        self._store, self._key = store, f"leases/{fence.fingerprint}/{fence.number}.stop"

    def give(self) -> None:
        self._store.write_bytes(self._key, b"save and end\n")

    @contextmanager
    def watched(self, flag: threading.Event) -> Iterator[None]:
        """Set `flag` as soon as the word is there."""
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(flag, ended), name="stop-notice", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, flag: threading.Event, ended: threading.Event) -> None:
        while not ended.wait(_LOOK_SECONDS):
            try:
                if self._store.exists(self._key):
                    flag.set()
                    return
            except Exception as error:  # noqa: BLE001 - whatever the store's client raises: the next look may succeed
                logger.warning("no look at %s: %s", self._key, error)
