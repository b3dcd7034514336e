"""Ray jobs of a test without their seconds of imports: a job gets a process forked from one that has imported all.

    python warm_jobs.py <socket> <module> <argument> ...     what such a Ray job runs, with the standard library alone

The forked process has the job's environment, folder and output, and is killed when the job is. One test plays the whole
pipeline in processes of their own (test_tiny_pipeline.py), so that what the others leave out is tested, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def warm_jobs(folder: Path) -> Iterator[Callable[[str], str]]:
    """Serve on a socket in `folder`; yields a function from a module to the entrypoint of its jobs."""
    address = folder / "warm-jobs"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        yield lambda module: f"{sys.executable} {__file__} {address} {module} {{config_uri}}"


def _accept(listening: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed at the end of the test
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=_run, args=(connection,), daemon=True).start()


def _run(connection: socket.socket) -> None:
    from tests.numerics.fork_server import shared_server

    with connection, connection.makefile("rw") as lines:
        order = json.loads(lines.readline())
        child = shared_server().start("tests.warm_jobs:become", log=Path(order.pop("output")), **order)
        while (status := child.poll()) is None:
            if select.select([connection], [], [], 0.05)[0]:  # a job says nothing more, so this is its end
                child.kill()
        lines.write(f"{status}\n")


def become(*, module: str, arguments: list[str], environment_of_job: dict[str, str], folder: str) -> int:
    """In the forked process: what `python -m <module>` does."""
    import importlib

    os.environ.clear()
    os.environ.update(environment_of_job)
    os.chdir(folder)
    return importlib.import_module(module).main(arguments)


def main(address: str, module: str, *arguments: str) -> int:
    order: dict[str, Any] = {
        "module": module,
        "arguments": arguments,
        "environment_of_job": dict(os.environ),
        "folder": os.getcwd(),
        "output": f"/proc/{os.getpid()}/fd/1",
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        with connection.makefile("rw") as lines:
            lines.write(json.dumps(order) + "\n")
            lines.flush()
            status = int(lines.readline())
    if status < 0:
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
