"""One attempt at one stage: scratch folder, tracker, progress and context, opened and closed together.

The job's process and each of its training workers open a context of their own, over the same request.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.artifacts.lease import Fence
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import without_logins
from stages.config.heard import JOB_RECORD, worker_record
from stages.config.nested import dotted
from stages.config.pipeline import stage_config_from_json
from stages.config.request import SourceEntry, StageRequest
from stages.job.context import StageContext
from stages.job.progress import Progress
from stages.job.scratch import scratch_folder
from stages.tracking.tracker import NullTracker, Tracker


@contextmanager
def opened_context(
    request: StageRequest,
    store: Store,
    *,
    fingerprint: str,
    sources: tuple[SourceEntry, ...],
    fence: Fence | None,
    rank: int | None = None,
) -> Iterator[StageContext]:
    """What a verb is given, in the job's process (`rank=None`) or in a training worker.

    The job ends the MLflow run: it calls `tracker.finish`, and an exception ends the run as failed. A worker leaves
    that to its job; only rank 0 reports at all.
    """
    execution = request.execution
    with scratch_folder() as work_dir:
        output_dir = work_dir / "output"
        output_dir.mkdir()
        progress = Progress(
            store,
            request.run.run_id,
            request.stage,
            record=JOB_RECORD if rank is None else worker_record(rank),
            # The job counts the GPUs of all workers, so that none is counted twice.
            num_gpus=execution.gpus_per_worker * max(execution.num_workers, 1) if rank is None else 0.0,
            stall_seconds=execution.stall_seconds,
        )
        context = StageContext(
            request=request,
            config=stage_config_from_json(request.stage, request.config),
            fingerprint=fingerprint,
            sources=sources,
            store=store,
            work_dir=work_dir,
            output_dir=output_dir,
            tracker=NullTracker() if rank else Tracker(request, work_dir / "spool"),
            progress=progress,
            fence=fence,
        )
        try:
            params = flat_params(context.config)
            context.tracker.start(fingerprint=fingerprint, params=params, tags=run_tags(request))
            yield context
        except BaseException as error:
            if rank is None:
                context.tracker.fail(without_logins(f"{type(error).__name__}: {error}"))
            raise
        finally:
            if rank is not None:
                context.tracker.close()
            progress.close()


def git_commit() -> str:
    """Commit of the running code: the image's label, else the checkout's HEAD, else `unknown`."""
    if labelled := os.environ.get("ATHANOR_GIT_COMMIT"):
        return labelled
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def run_tags(request: StageRequest) -> dict[str, str]:
    return {
        "airflow.dag_id": request.run.dag_id,
        "airflow.run_id": request.run.airflow_run_id,
        "airflow.task_id": request.task_id,
        "airflow.try_number": str(request.try_number),
        "ray.submission_id": request.submission_id,
        "git.commit": git_commit(),
    }


def flat_params(config: Config) -> dict[str, str]:
    return {path: str(value) for path, value in dotted(config).items()}
