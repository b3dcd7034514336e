"""Processes by the hundred: one parent imports torch, transformers, Ray and MLflow once and forks a child per process.

A forked child is a process like any other (own pid, own memory, killed like any other), it merely skips the seconds of
imports, and at its end those in which Python frees all that was imported. The parent must not have started a thread,
which it checks: a lock held by a thread that is not there after the fork would never be released.

    python -m tests.numerics.fork_server   reads one JSON object a line: {"start": …}, {"wait": pid} or {"poll": pid}
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from stages.__main__ import verb_of
from stages.config.graph import trained_stages
from tests.places import REPOSITORY

PRELOADED = (
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "ray.train.torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.loss.loss_utils",
    "stages.job.runner",
)

_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "true",
}


@dataclass(frozen=True)
class Child:
    """A process that the server has forked."""

    pid: int
    log: Path
    server: "ForkServer"

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # nobody else can have its pid: it is a zombie until `wait`

    def wait(self) -> int:
        """Return the exit status; negative for the signal that ended it."""
        return int(self.server.ask({"wait": self.pid})["status"])

    def poll(self) -> int | None:
        """Return the exit status once it has ended, and None before."""
        return self.server.ask({"poll": self.pid})["status"]


class ForkServer:
    """Starts functions of the form `module:name` with keyword arguments that JSON can carry."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._talking = threading.Lock()

    def start(
        self, function: str, *, log: Path, environment: Mapping[str, str] | None = None, **arguments: Any
    ) -> Child:
        order = {"function": function, "arguments": arguments, "log": str(log), "environment": dict(environment or {})}
        return Child(int(self.ask({"start": order})["pid"]), log, self)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._talking:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with status {self._process.wait()}")
        return json.loads(answer)


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    """The server with one thread a process, so that arithmetic is the same everywhere."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **_SETTINGS},
    )
    try:
        server = ForkServer(process)
        server.ask({"ready": True})
        yield server
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@cache
def shared_server() -> ForkServer:
    """The server of this test process, from the first test that asks to the end of the process."""
    running = contextlib.ExitStack()
    atexit.register(running.close)
    return running.enter_context(fork_server())


def _serve() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    for spec in trained_stages():
        verb_of(spec.stage)
    gc.freeze()  # a child that collects garbage does not walk through all of this, which would copy its pages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints here prints to the test's standard error
    for line in sys.stdin:
        match json.loads(line):
            case {"start": order}:
                answer = {"pid": _fork(order)}
            case {"wait": pid}:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                answer = {"status": status}
            case {"poll": pid}:
                ended, status = os.waitpid(pid, os.WNOHANG)
                answer = {"status": os.waitstatus_to_exitcode(status) if ended else None}
            case _:
                answer = {"ready": True}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(order: dict[str, Any]) -> int:
    threads = _threads()
    if len(threads) > 1:
        raise RuntimeError(f"forking is not safe while these threads run: {threads}; which import started them?")
    pid = os.fork()
    if pid == 0:
        _become(order)
    return pid


def _threads() -> list[str]:
    if sys.platform != "linux":
        return [thread.name for thread in threading.enumerate()]
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name != "jemalloc_bg_thd"]  # Arrow's allocator knows how to be forked


def _become(order: dict[str, Any]) -> NoReturn:
    """In the child: leave the server's loop for good and end as a program ends."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(0)  # noqa: SIM115 - for the life of the process
    os.environ.update(order["environment"])
    module, _, name = order["function"].partition(":")
    try:
        status = getattr(importlib.import_module(module), name)(**order["arguments"])
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # noqa: BLE001 - the log and the status tell it
        traceback.print_exc()
        status = 1
    _end(int(status or 0))


def _end(status: int) -> NoReturn:
    """Do what Python does at the end of a program, but for freeing all objects, which takes seconds here."""
    threading._shutdown()  # type: ignore[attr-defined] - it waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
    _end(0)
