"""From a request to a published artifact: validate, identify outside data, look for a hit, run the verb, manifest last.

Nothing heavy is imported before a verb is needed: a cache hit costs an interpreter start and two small reads.
"""

import errno
import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.artifacts.lease import Fence, Owner, acquire
from stages.artifacts.manifests import (
    artifact_key,
    artifact_uri,
    content_digest,
    find_intact,
    fingerprint,
    publish,
    run_key,
    upload_files,
    utc_now,
)
from stages.artifacts.store import Store, open_store, write_json
from stages.config.base import Config
from stages.config.errors import EXIT_CODES, Category, ConfigError, ExitCode, StageError, without_logins
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.request import Failure, InputEntry, Manifest, StageRequest, StageResult
from stages.job.context import StageContext, StageOutcome
from stages.job.logs import log_for_request, log_for_uri
from stages.job.progress import Progress, read_progress, worker_record
from stages.job.stopping import raise_stopped
from stages.tracking.tracker import NullTracker, Tracker, record_hit

logger = logging.getLogger("athanor")

_HISTORY = "history.jsonl"
_WAITING_SHOWN_SECONDS = 10.0
_VERSIONED = ("torch", "transformers", "ray", "mlflow", "datatrove", "tokenizers", "athanor")


# Torch's CPU allocator and cuBLAS raise plain RuntimeErrors; Ray's memory monitor kills the worker and says so.
_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "running low on memory",
)
# Python, torch and safetensors raise classes of their own, all with the system's words in them.
_DISK_FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def run_stage(config_uri: str) -> int:
    """Run the stage that `config_uri` describes and return the process's exit code."""
    signal.signal(signal.SIGTERM, raise_stopped)
    try:
        log_for_uri(config_uri)
        request, store = load_request(config_uri)
        log_for_request(request)
    except StageError as error:
        logger.error("%s %s", error.message, error.advice)
        return EXIT_CODES[error.category]
    try:
        result = execute(request, store)
    except BaseException as error:  # noqa: BLE001 - every failure becomes an exit code and a file, none is swallowed
        return _record_failure(store, request, error)
    write_json(store, run_key(request.run.run_id, request.stage, "result.json"), result.model_dump(mode="json"))
    logger.info("%s %s: %s", request.stage.value, "hit" if result.hit else "built", result.artifact.uri)
    return ExitCode.OK


def load_request(config_uri: str) -> tuple[StageRequest, Store]:
    """Read a StageRequest from `<store root>/runs/<run id>/<stage>/config.json`."""
    root, separator, tail = config_uri.rpartition("/runs/")
    if not separator:
        raise ConfigError(
            f"config uri {config_uri!r} is not of the form <store>/runs/<run id>/<stage>/config.json",
            advice="Start stages through the Airflow DAG, or write the request there first.",
        )
    store = open_store(root)
    try:
        data = store.read_bytes(f"runs/{tail}")
    except FileNotFoundError:
        raise ConfigError(
            f"config uri {config_uri!r} does not exist",
            advice="Check that Airflow and the Ray cluster see the same ARTIFACT_STORE.",
        ) from None
    return StageRequest.model_validate_json(data), store


def execute(request: StageRequest, store: Store) -> StageResult:
    """Return the stage's artifact, building it when it does not exist yet."""
    started = time.monotonic()
    config = stage_config_from_json(request.stage, request.config)
    sources = identify_sources(request, config)
    kind = GRAPH[request.stage].kind
    identity = fingerprint(request.stage, config, inputs=request.inputs, sources=sources)
    while True:
        manifest = find_intact(store, kind, identity)
        if manifest is not None:
            ref = manifest.ref(artifact_uri(store, manifest.kind, identity))
            record_hit(request, ref)
            return StageResult(stage=request.stage, hit=True, artifact=ref, metrics=manifest.metrics)
        lease = acquire(
            store, kind=kind, fingerprint=identity, owner=Owner.of(request), on_wait=_waiting(request, store)
        )
        if lease is not None:
            break
    with lease:
        manifest = _build(request, config, store, sources=sources, identity=identity, fence=lease.fence)
    ref = manifest.ref(artifact_uri(store, manifest.kind, identity))
    wall_seconds = round(time.monotonic() - started, 3)
    return StageResult(
        stage=request.stage,
        hit=False,
        artifact=ref,
        metrics=manifest.metrics,
        wall_seconds=wall_seconds,
        cost=manifest.cost,
    )


def identify_sources(request: StageRequest, config: Config) -> dict[str, str]:
    """Digest outside data where it lies; cheap enough to run before every cache look-up."""
    if not request.sources:
        return {}
    if request.stage is Stage.CURATE:
        from stages.data.sources.readers import snapshot_source

        return {uri: snapshot_source(uri, config) for uri in request.sources}  # type: ignore[arg-type]
    from stages.models.given import snapshot_base_model

    return {uri: snapshot_base_model(uri) for uri in request.sources}


def _waiting(request: StageRequest, store: Store) -> Callable[[Owner, float], None]:
    """Show the progress of whoever builds what we wait for, as if it were our own, and say whose it is."""
    progress, shown_at = Progress(store, request.run.run_id, request.stage, record=None), -_WAITING_SHOWN_SECONDS

    def show(holder: Owner, seconds: float) -> None:
        nonlocal shown_at
        if seconds - shown_at < _WAITING_SHOWN_SECONDS:
            return
        shown_at = seconds
        latest = read_progress(store, holder.run_id, request.stage)
        done, total, unit = latest.get("done", 0), latest.get("total", 0), latest.get("unit", "step")
        progress(done, total, unit, waiting_for=f"run {holder.run_id}, which builds it", waited_seconds=seconds)

    return show


def _build(
    request: StageRequest, config: Config, store: Store, *, sources: dict[str, str], identity: str, fence: Fence
) -> Manifest:
    verb = importlib.import_module(f"stages.{request.stage.value}")
    with _scratch_folder() as work_dir:
        execution = request.execution
        gpus = execution.gpus_per_worker * max(execution.num_workers, 1)
        progress = Progress(
            store, request.run.run_id, request.stage, num_gpus=gpus, stall_seconds=execution.stall_seconds
        )
        tracker = Tracker(request, work_dir / "spool")
        output_dir = work_dir / "output"
        output_dir.mkdir()
        context = StageContext(
            request, config, identity, sources, store, work_dir, output_dir, tracker, progress, fence
        )
        try:
            tracker.start(fingerprint=identity, params=_flat_params(config), tags=_tags(request))
            outcome = verb.run(context)
            context.check_lease()
            manifest = _manifest(context, outcome)
            run_id, model_id = tracker.finish(manifest, history=_history(store, manifest))
            manifest = manifest.model_copy(update={"mlflow_run_id": run_id, "mlflow_model_id": model_id})
            context.check_lease()
            publish(store, manifest)
        except BaseException as error:
            tracker.fail(without_logins(f"{type(error).__name__}: {error}"))
            raise
        finally:
            progress.close()
        store.delete(f"checkpoints/{identity}")
        return manifest


@contextmanager
def worker_context(
    request: StageRequest, identity: str, sources: dict[str, str], fence: Fence | None
) -> Iterator[StageContext]:
    """The context of a Ray Train worker: same stage, own scratch folder; only rank 0 reports."""
    store = open_store(request.store_uri)
    rank = int(os.environ.get("RANK", "0"))
    log_for_request(request, rank=rank)
    with _scratch_folder() as work_dir:
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
        tracker.start(fingerprint=identity, params=_flat_params(config), tags=_tags(request))
        try:
            yield StageContext(
                request, config, identity, sources, store, work_dir, output_dir, tracker, progress, fence
            )
        finally:
            tracker.close()
            progress.close()


def _manifest(context: StageContext, outcome: StageOutcome) -> Manifest:
    request, spec = context.request, GRAPH[context.request.stage]
    written = upload_files(context.store, context.output_dir, kind=spec.kind, fingerprint=context.fingerprint)
    files = (*outcome.files, *written)
    return Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=context.fingerprint,
        digest=content_digest(files),
        files=files,
        inputs=tuple(
            InputEntry(role=role, kind=ref.kind, uri=ref.uri, fingerprint=ref.fingerprint, digest=ref.digest)
            for role, ref in request.inputs.items()
        ),
        sources=context.sources,
        config=request.config,
        execution={
            **request.execution.model_dump(mode="json"),
            **outcome.execution,
            "submission_id": request.submission_id,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": _versions(),
        },
        metrics=outcome.metrics,
        ledger=outcome.ledger,
        cost=context.progress.cost(),
        created_at=utc_now(),
    )


def _history(store: Store, manifest: Manifest) -> str:
    """The metrics of every step; from the store, because a worker on another machine may have written them."""
    if not GRAPH[manifest.stage].trains or _HISTORY not in {entry.path for entry in manifest.files}:
        return ""
    return store.read_bytes(f"{artifact_key(manifest.kind, manifest.fingerprint)}/{_HISTORY}").decode()


def git_commit() -> str:
    """Commit of the running code: the image's label, else the checkout's HEAD, else `unknown`."""
    if labelled := os.environ.get("ATHANOR_GIT_COMMIT"):
        return labelled
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    installed = {}
    for name in _VERSIONED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _tags(request: StageRequest) -> dict[str, str]:
    return {
        "airflow.dag_id": request.run.dag_id,
        "airflow.run_id": request.run.airflow_run_id,
        "airflow.task_id": request.task_id,
        "airflow.try_number": str(request.try_number),
        "ray.submission_id": request.submission_id,
        "git.commit": git_commit(),
    }


def _flat_params(config: Config, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config:
        if isinstance(value, Config):
            flat |= _flat_params(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _scratch_home() -> Path:
    return Path(os.environ.get("ATHANOR_SCRATCH") or Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}")


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder of this attempt; downloads go beside it and stay for the next stage of the same machine."""
    home = _scratch_home()
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


def _record_failure(store: Store, request: StageRequest, error: BaseException) -> int:
    failure = describe_failure(error, request.stage)
    key = run_key(request.run.run_id, request.stage, "failure.json")
    try:
        if failure.category == Category.LOST and store.exists(key):
            # A worker that knew why it ended has written it; all that is seen of it from here is that it is gone.
            failure = Failure.model_validate_json(store.read_bytes(key))
        write_json(store, key, failure.model_dump(mode="json"))
    except Exception as problem:  # noqa: BLE001 - whatever the store's client raises; the exit code still tells
        logger.error("failure.json was not written: %s", problem)
    told = f"{request.stage.value} failed [{failure.category}]: {failure.message} {failure.advice}"
    logger.error("%s", f"{told}\n{failure.detail}".rstrip())
    return EXIT_CODES[Category(failure.category)]


def describe_failure(error: BaseException, stage: Stage) -> Failure:
    """Sort an exception of a stage into the failure contract; Ray's wrapping of worker errors is looked through."""
    cause = _cause(error)
    if any(text in str(cause) for text in _DISK_FULL_TEXTS):
        return Failure(
            category=Category.INFRASTRUCTURE,
            message=f"a disk of the worker's machine is full: {without_logins(str(cause))}",
            advice=f"Make room where stages write: {_scratch_home()} (ATHANOR_SCRATCH), {tempfile.gettempdir()} "
            "(TMPDIR), and a file:// store (`python -m infra gc`). The retry resumes from the newest checkpoint.",
        )
    if isinstance(cause, StageError):
        return Failure(category=cause.category, message=cause.message, advice=cause.advice)
    detail = without_logins("".join(traceback.format_exception(error)))[-8000:]
    if _is_out_of_memory(cause):
        return Failure(
            category=Category.OUT_OF_MEMORY,
            message=f"out of memory: {cause}",
            advice=f"The retry halves execution.{stage.value}.micro_batch_size; results do not change. "
            "gradient_checkpointing saves memory too.",
            detail=detail,
        )
    if _is_worker_death(cause):
        return Failure(
            category=Category.PREEMPTED if getattr(cause, "preempted", False) else Category.LOST,
            message=_death(cause),
            advice="The retry resumes from the newest checkpoint. If it recurs, see whether the kernel killed the "
            f"worker for want of memory (`dmesg`): a smaller execution.{stage.value}.micro_batch_size needs less.",
            detail=detail,
        )
    return Failure(
        category=Category.INFRASTRUCTURE,
        message=without_logins(f"{type(cause).__name__}: {cause}"),
        advice="Unexpected; the traceback is in the job's log. The task is retried and resumes from its checkpoint.",
        detail=detail,
    )


def _cause(error: BaseException) -> Any:
    """The error that explains the others: when one worker fails, its peers fail for want of it."""
    failures = getattr(error, "worker_failures", {}).values()
    # A worker's own exception is wrapped as a task's error, its death as a health check that failed.
    causes = [getattr(f, "cause", getattr(f, "health_check_failure", f)) for f in failures]
    telling = (lambda e: isinstance(e, StageError), _is_out_of_memory, _is_worker_death)
    for tells in telling:
        for cause in causes:
            if tells(cause):
                return cause
    return causes[0] if causes else error


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's, the CPU allocator's, or Ray's memory monitor's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def _death(error: BaseException) -> str:
    """Where a worker died and why; Ray says so on later lines, after one that says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    address = next((line.removeprefix("ip: ") for line in lines if line.startswith("ip: ")), "")
    reasons = [line.partition(". ")[0] for line in lines if " because " in line or "was terminated" in line]
    return f"a training worker died{address and f' on {address}'}: {', '.join(reasons) or lines[0]}"


def _is_worker_death(error: BaseException) -> bool:
    return type(error).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError", "NodeDiedError")
