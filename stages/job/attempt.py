"""One attempt at one stage: its scratch folder, tracker, progress and context, opened and closed together."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.artifacts.addresses import open_store
from stages.artifacts.lease import Fence
from stages.config.base import Config
from stages.config.errors import ConfigError
from stages.config.pipeline import stage_config_from_json
from stages.config.request import StageRequest
from stages.job.context import StageContext
from stages.job.logs import log_for_request
from stages.job.progress import Progress, worker_record
from stages.tracking.tracker import NullTracker, Tracker


@contextmanager
def worker_context(
    request: StageRequest, identity: str, sources: dict[str, str], fence: Fence | None
) -> Iterator[StageContext]:
    """The context of a Ray Train worker: same stage, own scratch folder; only rank 0 reports."""
    store = open_store(request.store_uri)
    rank = int(os.environ.get("RANK", "0"))
    log_for_request(request, rank=rank)
    with scratch_folder() as work_dir:
        config = stage_config_from_json(request.stage, request.config)
        progress = Progress(
            store,
            request.run.run_id,
            request.stage,
            record=worker_record(rank),
            stall_seconds=request.execution.stall_seconds,
        )
        tracker = Tracker(request, work_dir / "spool") if rank == 0 else NullTracker()
        output_dir = work_dir / "output"
        output_dir.mkdir()
        tracker.start(fingerprint=identity, params=flat_params(config), tags=run_tags(request))
        try:
            yield StageContext(
                request, config, identity, sources, store, work_dir, output_dir, tracker, progress, fence
            )
        finally:
            tracker.close()
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


def flat_params(config: Config, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config:
        if isinstance(value, Config):
            flat |= flat_params(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def scratch_home() -> Path:
    return Path(os.environ.get("ATHANOR_SCRATCH") or Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this attempt; downloads go beside it and stay for the next stage of the same machine."""
    home = scratch_home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise ConfigError(
            f"the scratch folder {home} belongs to user {home.stat().st_uid}, who could change what is trained",
            advice="Remove it, or set ATHANOR_SCRATCH to a folder of the user that Ray runs as.",
        )
    work_dir = Path(tempfile.mkdtemp(dir=home, prefix="stage-"))
    try:
        yield work_dir
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
