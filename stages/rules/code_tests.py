"""Runs the code of a response against the tests of its prompt, in a process that can do nothing else.

The process has an empty environment, a folder of its own, limits on processor time, memory and time on the clock, and
on Linux a filter of system calls (`code_child`). Where there is no such filter the rule is refused: code that a policy
writes in training tries everything sooner or later.
"""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stages.config.errors import ConfigError
from stages.rules.failed import RuleFailedError

_CHILD = Path(__file__).with_name("code_child.py")
_BLOCK = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_MOST_TOLD = 1 << 20
_START_SECONDS = 60.0
"""For the interpreter to start on a busy machine."""
_NOT_CONFINED = 3


@dataclass(frozen=True)
class CodeLimits:
    """What one response's code may use."""

    cpu_seconds: int = 5
    """Of a processor, for the code and all its tests together."""
    memory_bytes: int = 512 << 20
    """Of address space, the interpreter included."""

    @property
    def wall_seconds(self) -> float:
        """Time on the clock from when the code starts, for code that waits. Generous: processor time is the same on a
        busy machine and on an idle one, this is not."""
        return 3.0 * self.cpu_seconds + 2.0


@dataclass(frozen=True)
class Verdict:
    """What each test said: empty when it passed, else the reason."""

    reasons: tuple[str, ...]

    @property
    def share(self) -> float:
        return sum(not reason for reason in self.reasons) / len(self.reasons)


def code_in(response: str, language: str = "python") -> str:
    """The last fenced block of the language or of none named; the whole response when it has no fence."""
    blocks = [(name.casefold(), text) for name, text in _BLOCK.findall(response)]
    fitting = [text for name, text in blocks if name in ("", language, "py", "python3")]
    if fitting:
        return fitting[-1]
    return "" if blocks else response


def run_tests(response: str, tests: Sequence[str], limits: CodeLimits) -> Verdict:
    """Run the tests against the code in a response. A test that was not reached failed, whatever happened.

    Raises RuleFailedError when there is nothing to run, and ConfigError where code cannot be confined.
    """
    if not tests:
        raise RuleFailedError("no_tests")
    mark = secrets.token_hex(16)
    asked = {
        "code": code_in(response),
        "tests": list(tests),
        "mark": mark,
        "limits": {"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes},
    }
    with tempfile.TemporaryDirectory(prefix="athanor-tests-") as folder:
        told, status = _run(json.dumps(asked).encode(), folder, limits)
    if status == _NOT_CONFINED:
        require_confinement()
    return Verdict(_reasons(told, mark, len(tests), status))


def _run(question: bytes, folder: str, limits: CodeLimits) -> tuple[bytes, int | None]:
    """What the process told before it ended or was ended, and its exit status; None when it took too long."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        # libraries of linear algebra would start threads, which are refused
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        try:
            process.stdin.write(question + b"\n")
            process.stdin.close()
        except OSError:
            pass  # it ended before it read; its status says why
        told = _read(process.stdout.fileno(), limits.wall_seconds)
        try:
            return told, process.wait(1.0)
        except subprocess.TimeoutExpired:
            return told, None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.stdout.close()
        process.wait()


def _read(number: int, seconds: float) -> bytes:
    """All that the process tells, until it ends or is out of time; its first line says that it has started."""
    found, until = b"", time.monotonic() + _START_SECONDS
    while len(found) < _MOST_TOLD and (left := until - time.monotonic()) > 0:
        if not select.select([number], [], [], left)[0]:
            break
        part = os.read(number, 1 << 16)
        if not part:
            break
        if not found:
            until = time.monotonic() + seconds
        found += part
    return found


def _reasons(told: bytes, mark: str, num_tests: int, status: int | None) -> tuple[str, ...]:
    """Lines without the mark are not the tests': code that finds the pipe may write there."""
    ended = "took_too_long" if status in (None, -signal.SIGXCPU, -signal.SIGKILL) else "ended_early"
    reasons = [ended] * num_tests
    for line in told.split(b"\n"):
        try:
            sign, number, reason = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if sign == mark and isinstance(number, int) and 0 <= number < num_tests:
            reasons[number] = str(reason)
    return tuple(reasons)


@cache
def can_confine() -> bool:
    """Whether this machine can set the filter; found out once, by a process that sets it."""
    asked = {"code": "", "tests": [], "mark": ""}
    asked["limits"] = {"cpu_seconds": 5, "memory_bytes": 512 << 20}
    return _run(json.dumps(asked).encode(), "/", CodeLimits())[1] == 0


def require_confinement() -> None:
    """Raise ConfigError on a machine that cannot confine code."""
    if not can_confine():
        raise ConfigError(
            "the rule `tests` runs code that a model wrote, and this machine cannot confine it: that needs Linux on "
            "x86_64 or aarch64, with seccomp",
            advice="Run the stage where system calls can be filtered, or use another rule.",
        )
