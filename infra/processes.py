"""Finding and ending the processes of one stack. A stack is known by a marker in the environment that all its
processes inherit: process groups are not enough, since Ray's job drivers and workers open sessions of their own."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

MARKER = "ATHANOR_STACK"
HOME_MARKER = "ATHANOR_STACK_HOME"


def marking(stack_id: str, home: str = "") -> dict[str, str]:
    """The environment that marks a process and all it starts; `home` is where the stack keeps its state. SPT_NOENV
    keeps it readable: processes that retitle themselves, as Airflow's and Ray's do, would write the title over it."""
    return {MARKER: stack_id, HOME_MARKER: home, "SPT_NOENV": "1"}


def stacks_at(home: Path) -> set[str]:
    """The marks of all processes whose stack keeps its state in `home`: what runs is found without its record, too."""
    found = set()
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        # stacks that an older version started have the marker alone, and Airflow's home in every process
        places = (environment.get(HOME_MARKER), environment.get("AIRFLOW_HOME", "").removesuffix("/airflow"))
        if environment.get(MARKER) and str(home) in places:
            found.add(environment[MARKER])
    return found


def marked(stack_id: str) -> list[psutil.Process]:
    """Every live process with the marker, or descended from one with it, except this process and its ancestors."""
    own = psutil.Process()
    spared = {own.pid, *(parent.pid for parent in own.parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == stack_id:
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone by now, or another user's: not ours to end
    return [process for pid, process in found.items() if pid not in spared and not is_zombie(process)]


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_marked(stack_id: str, *, grace_seconds: float = 5.0) -> list[str]:
    """Send TERM, and KILL after the grace period, to every process that has the marker; return what they were.

    Looks again after each round, because a dying process may have started another one.
    """
    asked: dict[int, str] = {}
    seen: list[psutil.Process] = []
    start = time.monotonic()
    while processes := marked(stack_id):
        waited = time.monotonic() - start
        if waited > grace_seconds + 10:
            raise RuntimeError(f"processes do not end even on SIGKILL: {', '.join(asked.values())}")
        for process in processes:
            try:
                if waited > grace_seconds:
                    process.kill()
                elif process.pid not in asked:
                    asked[process.pid] = f"{process.pid} {describe(process)}"
                    seen.append(process)
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=0.3)
    wait_gone(seen, seconds=10)
    return list(asked.values())


def wait_gone(processes: Sequence[psutil.Process], *, seconds: float) -> None:
    """Wait until all have ended. A dying process loses its environment, and with it the marker, before it is gone; a
    zombie, which its parent has not collected yet, counts as ended."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and not is_zombie(process) for process in processes):
        if time.monotonic() > deadline:
            raise RuntimeError("processes of the stack are still ending; run `make down` again to make sure")
        time.sleep(0.05)


def describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()[:100] or process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "(gone)"


def listener_of(port: int) -> str:
    """Which process listens on a port, in words; empty when none does or we may not see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"{connection.pid} {describe(psutil.Process(connection.pid))}"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return ""
    return ""


def memory_bytes(processes: Sequence[psutil.Process]) -> int:
    """Proportional memory (PSS: shared pages counted once over their sharers); resident memory where unknown."""
    total = 0
    for process in processes:
        try:
            total += _pss(process.pid) or process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def usable_cpus() -> int:
    """Cores this process may run on; a container or taskset may allow fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1
