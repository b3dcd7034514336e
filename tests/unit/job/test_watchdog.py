"""The watchdog: a process that hangs leaves its stacks and its last words, and ends."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from stages.job.watchdog import Watchdog

HANGS = """
import sys, time
from stages.config.graph import Stage
from stages.job.progress import Progress
from stages.artifacts.addresses import open_store

def the_function_that_hangs():
    time.sleep(60)

progress = Progress(open_store(sys.argv[1]), "r", Stage.SFT, stall_seconds=0.5)
progress(3, 10)
the_function_that_hangs()
"""


def test_a_process_that_hangs_writes_its_stacks_and_its_reason_and_ends(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path.as_uri()], capture_output=True, text=True, timeout=40, check=False
    )
    assert done.returncode == 7
    assert "the_function_that_hangs" in done.stdout
    failure = json.loads((tmp_path / "runs/r/sft/failure.json").read_text())
    assert failure["category"] == "stalled"
    assert failure["message"].endswith("after step 3 of 10.")
    assert "execution.sft.stall_seconds" in failure["advice"]


def ended_with(watchdog_seconds: float, use) -> list[int]:
    codes: list[int] = []
    ended = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    dog = Watchdog(watchdog_seconds, on_stall=lambda silent: 7, exit_process=leave)
    use(dog)
    dog.close()
    return codes


def test_progress_keeps_it_quiet_and_so_does_a_pause():
    def work(dog: Watchdog) -> None:
        for _ in range(6):
            time.sleep(0.1)
            dog.beat()
        with dog.paused():
            time.sleep(0.6)

    assert ended_with(0.3, work) == []


def test_zero_seconds_watch_nothing():
    assert ended_with(0, lambda dog: time.sleep(0.2)) == []
