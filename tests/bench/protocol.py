"""How the benchmark talks to its workers: one JSON object a line, over standard input and output.

A worker trains for ever and pauses at the end of each round until it is told to go on, so that rounds of both sides
alternate on one machine and neither pays its start again. It imports nothing of ours, so that peers can use it too.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Rounds:
    """A worker's side: call `step` after every optimizer step."""

    def __init__(self, steps: int, *, in_step: Callable[[], None] = lambda: None) -> None:
        """`in_step` runs on every process when a round begins: a barrier where there are several."""
        self._steps, self._in_step = steps, in_step
        self._done, self._units, self._flops = 0, 0.0, 0.0
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to the log
        self._idle_bytes = peak_bytes()
        self._started = 0.0

    def begin(self) -> None:
        """Say that everything is ready, and wait for the first round."""
        self._idle_bytes = peak_bytes()
        self._send({"ready": True})
        self._wait()

    def count(self, units: float, *, flops: float = 0.0) -> None:
        """Add work that the step under way does."""
        self._units += units
        self._flops += flops

    def step(self, **more: Any) -> None:
        self._done += 1
        if self._done == self._steps:
            seconds = time.perf_counter() - self._started
            self._send(
                {
                    "seconds": seconds,
                    "units": self._units,
                    "flops": self._flops,
                    "peak_bytes": peak_bytes(),
                    "idle_bytes": self._idle_bytes,
                    **more,
                }
            )
            self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._in_step()
        self._done, self._units, self._flops = 0, 0.0, 0.0
        self._started = time.perf_counter()

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
