"""From a Ray job to Ray Train workers and back.

With `num_workers=0` and no GPUs Ray Train runs the body in the job's own process, which saves three process starts on
one machine. Otherwise rank 0 uploads what it wrote, because its disk may not be the job's; the job writes the manifest,
last.
"""

import contextlib
import importlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stages.artifacts.addresses import open_store
from stages.artifacts.lease import Fence
from stages.artifacts.manifests import upload_files
from stages.config.errors import CapacityError
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH
from stages.config.request import FileEntry, SourceEntry, StageRequest
from stages.job.attempt import opened_context
from stages.job.context import StageContext, StageOutcome
from stages.job.logs import log_for_request
from stages.job.stopping import StopNotice, postponing

logger = logging.getLogger(__name__)

_SHORTAGE_LOG_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 5.0


def launch(context: StageContext, body: Callable[..., StageOutcome], *functions: Callable[..., Any]) -> StageOutcome:
    """Run `body(context, *functions)` on the workers that the execution config asks for.

    All of them are functions of a module: other processes get their names, `module:function`, and import them.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from stages.job.process_group import OverRaysInterface

    execution = context.execution
    if execution.train_workers == 0:
        trainer = TorchTrainer(lambda: _to_json(body(context, *functions)), scaling_config=ScalingConfig(num_workers=0))
        return _from_json(trainer.fit().return_value)
    context.tracker.wait_run_id(30.0)
    elastic = 0 < execution.min_workers < execution.num_workers
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={
            "request": context.request.model_dump(mode="json"),
            "fingerprint": context.fingerprint,
            "sources": [source.model_dump(mode="json") for source in context.sources],
            "fence": context.fence.model_dump() if context.fence else None,
            "functions": [f"{function.__module__}:{function.__name__}" for function in (body, *functions)],
        },
        torch_config=OverRaysInterface(),
        scaling_config=ScalingConfig(
            num_workers=(execution.min_workers, execution.num_workers) if elastic else execution.train_workers,
            use_gpu=execution.gpus_per_worker > 0,
            resources_per_worker=resources_of_worker(execution),
        ),
        run_config=RunConfig(
            name=context.request.submission_id or context.fingerprint[:16],
            storage_path=f"{context.store.root_uri}/ray",
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    with context.progress.watchdog.paused():  # each worker has its own watchdog
        wait_for_capacity(execution, stage=context.request.stage.value)
        with _passing_on_stops(context):
            return _from_json(trainer.fit().return_value)


def _passing_on_stops(context: StageContext) -> contextlib.AbstractContextManager[None]:
    """On SIGTERM tell the workers, which save and end the training by failing with Stopped."""
    if context.fence is None or threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return postponing(StopNotice(context.store, context.fence).give)


def resources_of_worker(execution: ExecutionConfig) -> dict[str, float]:
    gpus = {"GPU": execution.gpus_per_worker} if execution.gpus_per_worker else {}
    return {"CPU": execution.cpus_per_worker, **gpus}


def wait_for_capacity(execution: ExecutionConfig, *, stage: str, clock: Callable[[], float] = time.monotonic) -> None:
    """Return when the cluster has room for the fewest workers allowed; raise CapacityError after `capacity_seconds`.

    The room is requested with a placement group, so that an autoscaler sees the demand; it is released again for the
    trainer. A worker too large for every node is waited for as well, because an autoscaler may add a larger node.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not ray.is_initialized():
        ray.init()
    started, pause = clock(), _FIRST_WAIT_SECONDS
    group = placement_group([resources_of_worker(execution)] * execution.least_workers, strategy="PACK")
    try:
        while not group.wait(pause):
            waited = clock() - started
            shortage = describe_shortage(execution, ray.cluster_resources(), ray.available_resources())
            if execution.capacity_seconds and waited >= execution.capacity_seconds:
                raise CapacityError(
                    f"no capacity for {waited:.0f} s: {shortage}.",
                    advice=f"Add nodes, wait for other jobs, lower execution.{stage}.num_workers, "
                    f"or raise execution.{stage}.capacity_seconds (now {execution.capacity_seconds:g}).",
                )
            logger.info("waiting for capacity: %s", shortage)
            left = execution.capacity_seconds - waited if execution.capacity_seconds else _SHORTAGE_LOG_SECONDS
            pause = max(0.1, min(_SHORTAGE_LOG_SECONDS, left))
    finally:
        remove_placement_group(group)


def describe_shortage(execution: ExecutionConfig, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """`asked 8 GPU, cluster has 4, 2 free; asked 64 CPU, cluster has 32, 30 free (8 workers)`."""
    workers = execution.least_workers
    parts = [
        f"asked {amount * workers:g} {name}, cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free"
        for name, amount in reversed(resources_of_worker(execution).items())
    ]
    return f"{'; '.join(parts)} ({workers} worker{'s' if workers > 1 else ''})"


def _on_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Body of a worker process: open a context, run, upload the files of rank 0."""
    request = StageRequest.model_validate(arguments["request"])
    rank = int(os.environ.get("RANK", "0"))
    log_for_request(request, rank=rank)
    with opened_context(
        request,
        open_store(request.store_uri),
        fingerprint=arguments["fingerprint"],
        sources=tuple(SourceEntry.model_validate(source) for source in arguments["sources"]),
        fence=Fence.model_validate(arguments["fence"]) if arguments["fence"] else None,
        rank=rank,
    ) as context:
        logger.info("rank %d trains in process %d on %s", rank, os.getpid(), platform.node())
        # Inside the context, because importing a training library may hang, and its watchdog runs from here on.
        body, *functions = map(_function, arguments["functions"])
        outcome: StageOutcome = body(context, *functions)
        if rank:
            return None
        context.check_lease()
        kind = GRAPH[request.stage].kind
        files = upload_files(context.store, context.output_dir, kind=kind, fingerprint=context.fingerprint)
        return _to_json(replace(outcome, files=files))


def _function(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _to_json(outcome: StageOutcome) -> dict[str, Any]:
    files = [entry.model_dump() for entry in outcome.files]
    return {
        "metrics": outcome.metrics,
        "ledger": outcome.ledger,
        "files": files,
        "execution": outcome.execution,
    }


def _from_json(data: Any) -> StageOutcome:
    files = tuple(FileEntry.model_validate(entry) for entry in data["files"])
    return StageOutcome(data["metrics"], data["ledger"], files, data["execution"])
