"""A rule's function in a process of its own, which can be ended: nothing else stops code that loops, or that exits.

A thread would not do, as it cannot be stopped, nor an alarm, as Ray runs workers outside of the main thread. The
function has the worker's environment; this is no sandbox (docs/SECURITY.md).
"""

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from stages.config.errors import ConfigError
from stages.rules.failed import RuleFailedError

logger = logging.getLogger(__name__)

CALL_SECONDS, START_SECONDS = 10.0, 120.0
"""For one response, and for the import of the module."""
_GIVEN_UP_AFTER = 3
"""Calls in a row that took too long: then no more are made, so that an evaluation ends."""
_READY = b"ready"
_CHILD = """
import importlib, json, os, sys
told, asked = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
os.dup2(2, 1)  # what the function prints is no answer
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
print("ready", file=told, flush=True)
for line in asked:
    try:
        answer = {"value": float(function(*json.loads(line)))}
    except BaseException as error:  # sys.exit too
        answer = {"failed": type(error).__name__}
    print(json.dumps(answer), file=told, flush=True)
"""


class RuleProcess:
    """Calls `module:name`; its process starts with the first call, and again after one that had to be ended."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._slow_in_a_row = 0
        self._lock = threading.Lock()

    def call(self, response: str, other: Any) -> float:
        """Return what the function says of a response and what it is compared with; raises RuleFailedError."""
        if self._slow_in_a_row >= _GIVEN_UP_AFTER:
            raise RuleFailedError("rule_takes_too_long")
        with self._lock:
            answer = self._answer(json.dumps([response, other]).encode())
        if failed := answer.get("failed"):
            raise RuleFailedError(f"rule_failed_{failed}")
        return float(answer["value"])

    def _answer(self, question: bytes) -> dict[str, Any]:
        process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(question + b"\n")
            process.stdin.flush()
            line = _line(process, CALL_SECONDS)
        except TimeoutError:
            self._end()
            self._slow_in_a_row += 1
            logger.warning("%s was ended: no value after %g s", self._address, CALL_SECONDS)
            raise RuleFailedError("rule_takes_too_long") from None
        except OSError:
            line = b""
        if not line:
            self._end()
            raise RuleFailedError("rule_ended_its_process")
        self._slow_in_a_row = 0
        return json.loads(line)

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(one or os.getcwd() for one in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *self._address.split(":")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        weakref.finalize(self, process.kill)
        self._process = process
        try:
            ready = _line(process, START_SECONDS).strip() == _READY
        except TimeoutError:
            ready = False
        if not ready:
            self._end()
            raise ConfigError(
                f"function={self._address!r} cannot be imported in a process of its own within {START_SECONDS:g} s",
                advice="Its log is above; try `python -c 'import <module>'` where Ray's processes run.",
            )
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of what the process tells; empty when it has ended. Raises TimeoutError."""
    assert process.stdout is not None
    number, until, found = process.stdout.fileno(), time.monotonic() + seconds, b""
    while not found.endswith(b"\n"):
        if not select.select([number], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(number, 1 << 16)
        if not part:
            return b""
        found += part
    return found
