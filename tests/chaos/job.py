"""What the chaos rows run as a Ray job: numbered lines and progress for some seconds, then an artifact.

`python -m tests.chaos.job <config uri> <behaviour>`: `lines:<seconds>` or `fail:<category>`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time

from stages.artifacts.addresses import run_key
from stages.artifacts.store import Store, write_json
from stages.config.errors import Category
from stages.config.request import StageRequest
from stages.job.runner import load_request, run_stage
from tests.integration.stage_stand_in import build, fail

LINES_PER_SECOND = 10


def note_pid(request: StageRequest, store: Store, role: str) -> None:
    """Where the test finds the process to kill."""
    key = run_key(request.run.run_id, request.stage, f"{role}-{request.submission_id}.json")
    write_json(store, key, {"pid": os.getpid()})


def pretrain_by(module: str) -> int:
    """Run `python -m <module> <config uri>`: pretraining by the module's `body`, found by its name, which a worker can
    import, unlike __main__."""
    from stages.job.workers import launch

    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    return run_stage(sys.argv[1], lambda stage: lambda context: launch(context, importlib.import_module(module).body))


def print_lines(request: StageRequest, seconds: float) -> None:
    total = int(seconds * LINES_PER_SECOND)
    for number in range(total):
        print(f"line {number} of {request.submission_id}", flush=True)
        if number % LINES_PER_SECOND == 0:
            progress = {"stage": request.stage.value, "done": number, "total": total, "unit": "line"}
            print("ATHANOR_PROGRESS", json.dumps(progress), flush=True)
        time.sleep(1 / LINES_PER_SECOND)


def main(config_uri: str, behaviour: str) -> int:
    request, store = load_request(config_uri)
    note_pid(request, store, "driver")
    kind, _, value = behaviour.partition(":")
    if kind == "fail":
        return fail(request, store, Category(value), f"the job fails with {value}.")
    print_lines(request, float(value))
    build(request, store)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
