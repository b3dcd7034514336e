"""supervisord keeps the stack's processes: it starts them detached, restarts crashed ones, rotates logs, stops groups.

It is asked over its own Unix socket; pid files are never trusted, so a reboot or kill -9 leaves nothing to clean up."""

from __future__ import annotations

import http.client
import os
import shlex
import socket
import subprocess
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.components import BIN, MIB, Component, installed
from infra.layout import Layout, StackRecord
from infra.private import write_private

_ANSWER_SECONDS = 60.0
RUNNING_STATES = ("STARTING", "RUNNING", "BACKOFF")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """For sockets opened meanwhile: supervisor's transport takes no time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@dataclass(frozen=True)
class ProgramState:
    """What supervisord reports about one program."""

    name: str
    state: str
    pid: int
    started_at: int
    why: str


class Supervisor:
    """Client of the stack's supervisord; knows how to start it when it does not answer."""

    def __init__(self, layout: Layout, record: StackRecord) -> None:
        self._layout = layout
        self._record = record

    def _ask(self, method: str, *arguments: object) -> Any:
        """Each question has a connection of its own: supervisor's transport cannot use one again that has failed."""
        # In a function, because deployments run `doctor` and `gc` without the extra `stack`.
        from supervisor.xmlrpc import SupervisorTransport

        address = f"unix://{self._record.supervisor_socket}"
        with _time_limit(_ANSWER_SECONDS), closing(SupervisorTransport(serverurl=address)) as transport:
            proxy = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)

    def answers(self) -> bool:
        """Whether our supervisord runs; one of another stack on a re-used socket does not count."""
        try:
            return self._ask("getIdentification") == self._identifier
        except (OSError, http.client.HTTPException, xmlrpc.client.Error):
            return False  # the last while it shuts down

    @property
    def _identifier(self) -> str:
        return f"athanor-{self._record.stack_id}"

    def launch(self, components: Sequence[Component], environment: Mapping[str, str], *, programs: Path = BIN) -> None:
        """Write the configuration and start supervisord as a daemon; no program runs yet."""
        write_private(self._layout.supervisor_config, self._configuration(components))
        done = subprocess.run(
            installed("supervisord", "-c", str(self._layout.supervisor_config), programs=programs),
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"supervisord did not start: {(done.stderr or done.stdout).strip()}")

    def states(self) -> list[ProgramState]:
        rows = self._ask("getAllProcessInfo")
        return [ProgramState(r["name"], r["statename"], r["pid"], r["start"], r["spawnerr"]) for r in rows]

    def state(self, name: str) -> ProgramState:
        return next(state for state in self.states() if state.name == name)

    def start(self, name: str) -> None:
        """Start a program without waiting for it; a no-op when it runs."""
        try:
            self._ask("startProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                raise RuntimeError(f"supervisord cannot start {name}: {fault.faultString}") from fault

    def stop_everything(self) -> None:
        """Stop all programs at once, then supervisord itself; if it hangs or dies meanwhile, the caller ends it all."""
        with suppress(OSError, http.client.HTTPException, xmlrpc.client.Error):
            self._ask("stopAllProcesses", True)
            self._ask("shutdown")

    def wait_gone(self, *, seconds: float) -> None:
        """Wait until supervisord no longer answers; the caller ends what lives longer."""
        deadline = time.monotonic() + seconds
        while self.answers() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.2)

    def _configuration(self, components: Sequence[Component]) -> str:
        logs = self._layout.logs
        sections = {
            "unix_http_server": {"file": self._record.supervisor_socket, "chmod": "0700"},
            "supervisord": {
                "logfile": logs / "supervisord.log",
                "logfile_maxbytes": 4 * MIB,
                "logfile_backups": 2,
                "pidfile": self._layout.home / "supervisord.pid",
                "identifier": self._identifier,
                "childlogdir": logs,
                # said explicitly, or supervisord complains about running as root
                **({"user": "root"} if os.getuid() == 0 else {}),
            },
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
        }
        sections |= {f"program:{component.name}": self._program(component) for component in components}
        return "".join(
            f"[{name}]\n" + "".join(f"{key} = {_escaped(value)}\n" for key, value in keys.items()) + "\n"
            for name, keys in sections.items()
        )

    def _program(self, component: Component) -> dict[str, object]:
        return {
            "command": shlex.join(component.command),
            "directory": self._layout.home,
            "environment": ",".join(f'{name}="{value}"' for name, value in component.environment.items()),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": 2,
            "startretries": 2,
            "stopwaitsecs": component.stop_seconds,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": self._layout.log_of(component.name),
            "stdout_logfile_maxbytes": 16 * MIB,
            "stdout_logfile_backups": 2,
        }


def _escaped(value: object) -> str:
    """supervisord expands %(name)s, so a percent sign in a path must be doubled."""
    return str(value).replace("%", "%%")


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log file for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return "(no log yet)"
