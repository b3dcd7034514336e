"""Real servers for tests: a Ray head, an MLflow server and an S3 server, each in a directory and on ports of its own.
All their processes carry a marker that names this test session, so that none outlives it, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from infra.components import RAY_ADDRESS, Component, mlflow_server, ray_head
from infra.health import mlflow_missing, ray_missing
from infra.ports import any_free
from infra.processes import MARKER, end_marked, marking
from infra.supervisor import last_lines

PREFIX = "pytest"
STARTED = f"{PREFIX}-{os.getpid()}-{int(psutil.Process().create_time())}"


class ServerError(RuntimeError):
    """A server of the tests did not start; the message ends with its log."""


def end_leftovers() -> None:
    """End servers of test sessions that are gone; a session that still runs keeps its own."""
    for value in {process_marker(process) for process in psutil.process_iter()}:
        if value.startswith(f"{PREFIX}-") and not _session_lives(value):
            end_marked(value, grace_seconds=2)


def process_marker(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARKER, "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _session_lives(value: str) -> bool:
    _, pid, created, *_ = value.split("-")
    try:
        return int(psutil.Process(int(pid)).create_time()) == int(created)
    except psutil.NoSuchProcess:
        return False


def _die_with_parent() -> None:
    """In the child before exec: SIGTERM when the test process dies, even by SIGKILL. Only Linux offers it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    answers: Callable[[], bool],
    seconds: float = 120,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; it is up when `answers` is true, and gone with all its children after."""
    marker = f"{STARTED}-{name}-{secrets.token_hex(3)}"
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **environment, **marking(marker)},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        _wait(name, process, log=log, answers=answers, seconds=seconds)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end_marked(marker, grace_seconds=2)


def _wait(
    name: str, process: subprocess.Popen[bytes], *, log: Path, answers: Callable[[], bool], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if answers():
                return
        except (httpx.HTTPError, OSError):
            pass  # not listening yet; the deadline bounds the wait
        time.sleep(0.1)
    how = f"ended with status {process.returncode}" if process.returncode is not None else f"silent for {seconds:.0f} s"
    raise ServerError(f"{name} did not start, {how}; end of {log}:\n{last_lines(log, 30)}")


def _component(
    component: Component,
    *,
    log: Path,
    environment: Mapping[str, str],
    answers: Callable[[], bool],
    within: Sequence[str] = (),
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return running(
        component.name,
        (*within, *component.command),
        log=log,
        environment={**component.environment, **environment},
        answers=answers,
    )


class Restartable:
    """A server that a test may kill and start again; all that was ever started is gone after `stop`."""

    def __init__(self, start: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]) -> None:
        self._start = start
        self._started = ExitStack()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self._started.enter_context(self._start())

    @property
    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the server and the processes that it started itself; what those started is left behind."""
        assert self.process is not None, "it does not run"
        process = psutil.Process(self.process.pid)
        for victim in (process, *process.children()):
            with suppress(psutil.NoSuchProcess):  # it may end with its parent
                victim.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        self._started.close()


# ------------------------------------------------------------------- Ray


@dataclass(frozen=True)
class RayServer:
    """A Ray head with token authentication."""

    url: str
    "The Jobs REST API."
    token: str
    gcs_address: str
    session_root: Path
    """Session files of Ray: logs of its own and of its jobs."""
    head: Restartable = field(repr=False, compare=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@contextmanager
def ray_server(
    *,
    num_cpus: int = 2,
    environment: Mapping[str, str] | None = None,
    address: str = RAY_ADDRESS,
    within: Sequence[str] = (),
) -> Iterator[RayServer]:
    """A Ray head of its own; `environment` is what its jobs inherit, such as ARTIFACT_STORE. `within` is put before its
    command, such as `ip netns exec NAME`, where `address` is then."""
    root = Path(tempfile.mkdtemp(prefix="ath-ray-", dir="/tmp"))  # its Unix sockets need a short path
    ports = {name: any_free() for name in ("ray_gcs", "ray_dashboard", "ray_agent_http")}
    component = ray_head(
        ports=ports, session_root=root, num_cpus=num_cpus, object_store_bytes=128 * 2**20, address=address
    )
    token, log, url = secrets.token_hex(32), root / "head.log", f"http://{address}:{ports['ray_dashboard']}"
    agent_url = f"http://{address}:{ports['ray_agent_http']}"
    shared = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        **(environment or {}),
    }

    @contextmanager
    def head() -> Iterator[subprocess.Popen[bytes]]:
        def once():
            return _component(
                component,
                log=log,
                environment=shared,
                answers=lambda: ray_missing(url, token, agent_url=agent_url) is None,
                within=within,
            )

        with ExitStack() as stack:
            try:
                process = stack.enter_context(once())
            except ServerError:
                # Ray gives its node 30 s to join, which no setting changes and a busy machine may miss; once more then
                if "timed out during startup" not in log.read_text(errors="replace"):
                    raise
                process = stack.enter_context(once())
            yield process

    server = RayServer(
        url=url,
        token=token,
        gcs_address=f"{address}:{ports['ray_gcs']}",
        session_root=root,
        head=Restartable(head),
    )
    try:
        server.head.start()
        yield server
    finally:
        server.head.stop()
        shutil.rmtree(root, ignore_errors=True)


# ---------------------------------------------------------------- MLflow


def restartable_mlflow(root: Path) -> tuple[str, Restartable]:
    """The URL of an MLflow server with SQLite under `root`, and the server, which is not started yet."""
    (root / "artifacts").mkdir(parents=True, exist_ok=True)
    port = any_free()
    url = f"http://127.0.0.1:{port}"

    def start() -> AbstractContextManager[subprocess.Popen[bytes]]:
        return _component(
            mlflow_server(port=port, home=root),
            log=root / "server.log",
            environment={"MLFLOW_DISABLE_TELEMETRY": "true"},
            answers=lambda: mlflow_missing(url) is None,
        )

    return url, Restartable(start)


@contextmanager
def mlflow_tracking(root: Path) -> Iterator[str]:
    """An MLflow server with SQLite under `root`; yields its URL."""
    url, server = restartable_mlflow(root)
    try:
        server.start()
        yield url
    finally:
        server.stop()
