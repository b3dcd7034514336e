"""A job's process ends as Python ends a program, and frees nothing."""

import subprocess
import sys

PROGRAM = """
import atexit, threading, time
from stages.job.ending import end

class Held:
    def __del__(self):
        print("freed")

held = Held()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
print("the program", end=" and ")
{end}(3)
"""


def test_threads_exit_functions_and_output_come_before_the_end_and_nothing_is_freed() -> None:
    told = {}
    for name in ("end", "raise SystemExit"):
        command = [sys.executable, "-c", PROGRAM.replace("{end}", name)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=100)
        told[name] = (done.returncode, done.stdout)
    assert told["end"] == (3, "the program and a thread\nat exit\n")
    assert told["raise SystemExit"] == (3, "the program and a thread\nat exit\nfreed\n")  # what Python does
