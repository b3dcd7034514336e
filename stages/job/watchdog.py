"""Ends a process that makes no progress any more, after writing the stacks of all its threads into the log.

A hang (a collective that waits for a dead rank, a store that never answers) sits in C code, where no exception
reaches it: the watchdog therefore leaves by `os._exit`, and the retry resumes from the newest checkpoint.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger("athanor")

_FLUSH_SECONDS = 3.0
"""A worker's output reaches the job's log through Ray's log monitor, which lags behind."""


class Watchdog:
    """Call `beat` at every sign of progress; `on_stall` gets the seconds since the last one, then the process ends."""

    def __init__(
        self,
        seconds: float,
        *,
        on_stall: Callable[[float], int],
        exit_process: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_stall` returns the exit code; `seconds=0` watches nothing."""
        self._seconds, self._on_stall, self._exit, self._clock = seconds, on_stall, exit_process, clock
        self._last = clock()
        self._paused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def beat(self) -> None:
        self._last = self._clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not watched inside, where other code has its own limit: a worker, the wait for capacity."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat()
            self._paused -= 1

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            silent = self._clock() - self._last
            if not self._paused and silent >= self._seconds:
                self._end(silent)
                return

    def _end(self, silent: float) -> None:
        code = 1
        try:
            logger.error("no progress for %.0f s; the stacks of all threads of process %d follow", silent, os.getpid())
            dump_stacks()
            code = self._on_stall(silent)
        finally:
            time.sleep(_FLUSH_SECONDS)
            self._exit(code)


def dump_stacks() -> None:
    """Write the stacks of all threads straight to file descriptor 1, past Python's streams, which may be blocked."""
    with contextlib.suppress(ValueError, OSError):  # a closed stream must not keep a stalled process alive
        sys.stdout.flush()
    try:
        faulthandler.dump_traceback(file=1, all_threads=True)
    except OSError as error:
        logger.error("the stacks could not be written: %s", error)
