"""A process of the fork server ends as a program ends, though it frees nothing."""

import os
import subprocess
import sys
from pathlib import Path

from tests.places import REPOSITORY

PLAYED = """
import atexit, sys, threading, time

def works():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
    print("the function", end=" and ")
    return 3

def fails():
    print("before", end="")
    raise ValueError("a reason")

def leaves():
    sys.exit(5)
"""
BECOME = """
import sys
from tests.numerics.fork_server import _become
_become({"function": f"played:{sys.argv[1]}", "arguments": {}, "environment": {}, "log": sys.argv[2]})
"""


def test_a_child_waits_for_its_threads_runs_what_is_registered_and_writes_out_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "played.py").write_text(PLAYED)
    path = os.pathsep.join((str(REPOSITORY), str(tmp_path)))
    told = {}
    for name in ("works", "fails", "leaves"):
        log = tmp_path / name
        command = [sys.executable, "-c", BECOME, name, str(log)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, timeout=200)
        told[name] = (done.returncode, log.read_text())
    assert told["works"] == (3, "the function and a thread\nat exit\n")
    assert told["fails"][0] == 1
    assert "ValueError: a reason" in told["fails"][1]
    assert "before" in told["fails"][1]
    assert told["leaves"] == (5, "")
