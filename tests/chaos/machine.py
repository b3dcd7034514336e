"""Faults of a worker's machine: memory that the kernel takes away, a disk that is full, a clock that is wrong, a bit
that flips."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from stages.artifacts.store import Store

_CGROUPS = Path("/sys/fs/cgroup/memory")
_FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
_ALLOWED_BYTES = 64 * 2**20
_EATEN_BYTES = 4 * _ALLOWED_BYTES


def flip_one_byte(store: Store, key: str) -> None:
    """In the middle of an object; its size stays."""
    data = bytearray(store.read_bytes(key))
    data[len(data) // 2] ^= 1
    store.write_bytes(key, bytes(data))


# ------------------------------------------------------------------ memory


def require_memory_cgroups() -> None:
    if not os.access(_CGROUPS / "cgroup.procs", os.W_OK):
        pytest.skip(f"{_CGROUPS} cannot be written: this needs root and cgroup v1")


def starve(process: psutil.Process) -> None:
    """Let a neighbour eat the memory that a process shares with it: the kernel takes the larger one first."""
    group = _CGROUPS / f"athanor-drill-{process.pid}"
    group.mkdir()
    eater = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdin.read(1); bytearray({_EATEN_BYTES}); sys.stdin.read()"],
        stdin=subprocess.PIPE,
    )
    try:
        (group / "memory.limit_in_bytes").write_text(str(_ALLOWED_BYTES))
        for pid in (process.pid, eater.pid):
            (group / "cgroup.procs").write_text(str(pid))
        assert eater.stdin
        eater.stdin.write(b"x")
        eater.stdin.flush()
        _wait_until("the kernel kills the process", lambda: not process.is_running())
        assert "oom_kill 0" not in (group / "memory.oom_control").read_text(), "something else killed it"
    finally:
        eater.kill()
        eater.wait()
        _wait_until("the group is empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _wait_until(what: str, reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


# -------------------------------------------------------------------- disk


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few MiB."""

    folder: Path

    def grow(self, mebibytes: int) -> None:
        _run("mount", "-o", f"remount,size={mebibytes}m", str(self.folder))


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Mounted until the block ends; skips where that is not allowed."""
    folder.mkdir()
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "tmpfs", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "--lazy", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


# ------------------------------------------------------------------- clock


@dataclass(frozen=True)
class Clock:
    """The clock of processes that run in `environment`."""

    file: Path

    def __post_init__(self) -> None:
        if not _FAKETIME:
            pytest.skip("libfaketime is not installed (Debian: apt-get install faketime)")

    def ahead(self, days: int) -> None:
        self.file.write_text(f"{days:+d}d\n")

    @property
    def environment(self) -> dict[str, str]:
        """Files keep their true times, as those of a file server do."""
        return {
            "LD_PRELOAD": str(_FAKETIME[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
