"""How a Ray job's process ends: as Python ends a program, except that it frees nothing.

With torch, transformers, Ray and mlflow in memory that takes Python seconds, object by object, while Airflow waits for
the job. The operating system takes the memory back anyway.
"""

import atexit
import os
import sys
import threading
from typing import NoReturn


def end(status: int) -> NoReturn:
    """Wait for threads, run what is registered for the exit, write out what was printed, and end with `status`."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
