"""From a Ray job to Ray Train workers and back.

With `num_workers=0` Ray Train runs the body in the job's own process, which saves three process starts on one machine.
Otherwise rank 0 uploads what it wrote, because a worker's disk is not the job's; the job writes the manifest, last.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

from stages.artifacts import upload_files
from stages.config.graph import GRAPH
from stages.config.request import FileEntry, StageRequest
from stages.context import StageContext, StageOutcome

Body = Callable[[StageContext], StageOutcome]


def launch(context: StageContext, body: Body) -> StageOutcome:
    """Run `body`, a module-level function, on the workers that the execution config asks for."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    execution = context.execution
    if execution.num_workers == 0:
        trainer = TorchTrainer(lambda: _to_json(body(context)), scaling_config=ScalingConfig(num_workers=0))
        return _from_json(trainer.fit().return_value)
    context.tracker.wait_run_id(30.0)
    gpus = {"GPU": execution.gpus_per_worker} if execution.gpus_per_worker else {}
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={
            "request": context.request.model_dump(mode="json"),
            "fingerprint": context.fingerprint,
            "sources": context.sources,
            "fence": context.fence.model_dump() if context.fence else None,
            "body": f"{body.__module__}:{body.__name__}",
        },
        scaling_config=ScalingConfig(
            num_workers=execution.num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": execution.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=context.request.submission_id or context.fingerprint[:16],
            storage_path=f"{context.store.root_uri}/ray",
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    return _from_json(trainer.fit().return_value)


def _on_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Body of a worker process: rebuild the context, run, publish the files of rank 0."""
    from stages.lease import Fence
    from stages.runner import worker_context

    request = StageRequest.model_validate(arguments["request"])
    module, _, name = arguments["body"].partition(":")
    fence = Fence.model_validate(arguments["fence"]) if arguments["fence"] else None
    with worker_context(request, arguments["fingerprint"], arguments["sources"], fence) as context:
        outcome: StageOutcome = getattr(importlib.import_module(module), name)(context)
        if os.environ.get("RANK", "0") != "0":
            return None
        context.check_lease()
        kind = GRAPH[request.stage].kind
        files = upload_files(context.store, context.output_dir, kind=kind, fingerprint=context.fingerprint)
        return _to_json(StageOutcome(outcome.metrics, outcome.ledger, files))


def _to_json(outcome: StageOutcome) -> dict[str, Any]:
    files = [entry.model_dump() for entry in outcome.files]
    return {"metrics": outcome.metrics, "ledger": outcome.ledger, "files": files}


def _from_json(data: Any) -> StageOutcome:
    return StageOutcome(data["metrics"], data["ledger"], tuple(FileEntry.model_validate(f) for f in data["files"]))
