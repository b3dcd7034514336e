"""Processes are found by the marker they inherit, wherever they went, and nothing else is touched."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from infra.processes import end_marked, marked, marking, memory_bytes, tree

# a parent that moves its child to a session of its own, as Ray does with job drivers, and then retitles itself
FAMILY = """
import subprocess, sys, time, setproctitle
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
setproctitle.setproctitle("a very different title " * 20)
print(child.pid, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def started(code: str, marker: str | None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = {**os.environ, **(marking(marker) if marker else {})}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_an_orphan_in_another_session_is_found_and_ended() -> None:
    with started(FAMILY, "test-family") as (parent, child):
        assert {p.pid for p in marked("test-family")} == {parent.pid, int(child)}
        parent.kill()
        parent.wait()
        assert {p.pid for p in marked("test-family")} == {int(child)}
        ended = end_marked("test-family")
        assert len(ended) == 1
        assert wait_gone(int(child))


def test_other_stacks_and_unmarked_processes_are_left_alone() -> None:
    with started(FAMILY, "test-theirs") as (theirs, child), started(FAMILY, None) as (nobodys, orphan):
        assert end_marked("test-ours") == []
        assert theirs.poll() is None
        assert nobodys.poll() is None
        psutil.Process(int(child)).kill()
        psutil.Process(int(orphan)).kill()


def test_what_ignores_term_is_killed_after_the_grace() -> None:
    with started(STUBBORN, "test-stubborn") as (process, ready):
        assert ready == "ready"
        begin = time.monotonic()
        end_marked("test-stubborn", grace_seconds=0.5)
        assert time.monotonic() - begin >= 0.5
        assert wait_gone(process.pid)


def test_memory_of_a_tree_counts_its_children() -> None:
    with started(FAMILY, "test-memory") as (parent, _):
        family = tree(parent.pid)
        assert len(family) == 2
        assert memory_bytes(family) > memory_bytes(family[:1]) > 1_000_000
        end_marked("test-memory")
    assert tree(parent.pid) == []
