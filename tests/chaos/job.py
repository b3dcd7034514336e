"""What the chaos rows run as a Ray job: numbered lines and progress for some seconds, then an artifact.

`python job.py <config uri> <behaviour>`: `lines:<seconds>`, `fail:<category>`, or `train` (a Ray Train worker).
"""

from __future__ import annotations

import json
import os
import sys
import time

from stages.artifacts import run_key
from stages.config.errors import Category
from stages.config.request import StageRequest
from stages.runner import describe_failure, load_request
from stages.store import Store, write_json
from tests.integration.stage_stand_in import build, fail

LINES_PER_SECOND = 10


def note_pid(request: StageRequest, store: Store, role: str) -> None:
    """Where the test finds the process to kill."""
    key = run_key(request.run.run_id, request.stage, f"{role}-{request.submission_id}.json")
    write_json(store, key, {"pid": os.getpid()})


def print_lines(request: StageRequest, seconds: float) -> None:
    total = int(seconds * LINES_PER_SECOND)
    for number in range(total):
        print(f"line {number} of {request.submission_id}", flush=True)
        if number % LINES_PER_SECOND == 0:
            progress = {"stage": request.stage.value, "done": number, "total": total, "unit": "line"}
            print("ATHANOR_PROGRESS", json.dumps(progress), flush=True)
        time.sleep(1 / LINES_PER_SECOND)


def worker(arguments: dict[str, str]) -> None:
    """A training worker: on the first attempt it waits to be killed."""
    request, store = load_request(arguments["config_uri"])
    note_pid(request, store, "worker")
    if request.try_number == 1:
        time.sleep(120)


def train(config_uri: str, request: StageRequest, store: Store) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from stages.config.execution import ExecutionConfig
    from stages.train.launch import wait_for_capacity

    wait_for_capacity(ExecutionConfig(num_workers=1, cpus_per_worker=1), stage=request.stage.value)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config_uri": config_uri},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=request.submission_id,
            storage_path=f"{store.root_uri}/ray",
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 - sorted by the code under test
        failure = describe_failure(error)
        return fail(request, store, Category(failure.category), failure.message)
    build(request, store)
    return 0


def main(config_uri: str, behaviour: str) -> int:
    request, store = load_request(config_uri)
    note_pid(request, store, "driver")
    kind, _, value = behaviour.partition(":")
    if kind == "train":
        return train(config_uri, request, store)
    if kind == "fail":
        return fail(request, store, Category(value), f"the job fails with {value}.")
    print_lines(request, float(value))
    build(request, store)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
