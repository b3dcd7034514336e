"""Sorts exceptions of a stage into the categories of the failure contract and writes `failure.json` for Airflow."""

import errno
import logging
import os
import tempfile
import traceback
from typing import Any

from stages.artifacts.addresses import run_key
from stages.artifacts.store import Store, write_json
from stages.config.errors import EXIT_CODES, Category, DataError, StageError, without_logins
from stages.config.graph import Stage
from stages.config.records import parse_record
from stages.config.request import Failure, StageRequest
from stages.job.scratch import scratch_home

logger = logging.getLogger("athanor")


# Torch's CPU allocator and cuBLAS raise plain RuntimeErrors; Ray's memory monitor kills the worker and logs this.
_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "running low on memory",
)


# Python, torch and safetensors each raise a class of their own; all of them quote the system's error text.
_DISK_FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def record_failure(store: Store, request: StageRequest, error: BaseException) -> int:
    failure = describe_failure(error, request.stage)
    key = run_key(request.run.run_id, request.stage, "failure.json")
    try:
        if failure.category == Category.LOST and store.exists(key):
            # The worker that ended has written why; this process only sees that the worker is gone.
            failure = _told(store, key) or failure
        write_json(store, key, failure.model_dump(mode="json"))
    except Exception as problem:  # noqa: BLE001 - whatever the store's client raises; the exit code still tells the category
        logger.error("failure.json was not written: %s", problem)
    summary = f"{request.stage.value} failed [{failure.category}]: {failure.message} {failure.advice}"
    logger.error("%s", f"{summary}\n{failure.detail}".rstrip())
    return EXIT_CODES[Category(failure.category)]


def _told(store: Store, key: str) -> Failure | None:
    """What a worker has written; None when that is damaged."""
    try:
        told = parse_record(Failure, store.read_bytes(key), f"{store.root_uri}/{key}")
    except DataError as error:
        logger.warning("%s", error.message)
        return None
    return told if told.category in set(Category) else None


def describe_failure(error: BaseException, stage: Stage) -> Failure:
    """Sort an exception of a stage into the failure contract; errors of workers are unwrapped from Ray's first."""
    cause = _cause(error)
    if any(text in str(cause) for text in _DISK_FULL_TEXTS):
        return Failure(
            category=Category.INFRASTRUCTURE,
            message=f"a disk of the worker's machine is full: {without_logins(str(cause))}",
            advice=f"Make room where stages write: {scratch_home()} (ATHANOR_SCRATCH), {tempfile.gettempdir()} "
            "(TMPDIR), and a file:// store (`python -m infra gc`). The retry resumes from the newest checkpoint.",
        )
    if isinstance(cause, StageError):
        return Failure(category=cause.category, message=cause.message, advice=cause.advice)
    detail = without_logins("".join(traceback.format_exception(error)))[-8000:]
    if is_out_of_memory(cause):
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
            advice="The retry resumes from the newest checkpoint. If it recurs, check with `dmesg` whether the kernel "
            f"killed the worker because memory ran out; a smaller execution.{stage.value}.micro_batch_size needs less.",
            detail=detail,
        )
    return Failure(
        category=Category.INFRASTRUCTURE,
        message=without_logins(f"{type(cause).__name__}: {cause}"),
        advice="Unexpected; the traceback is in the job's log. The task is retried and resumes from its checkpoint.",
        detail=detail,
    )


def _cause(error: BaseException) -> Any:
    """The error that explains the others: when one worker fails, its peers fail because it is missing."""
    failures = getattr(error, "worker_failures", {}).values()
    # A worker's own exception is wrapped as a task's error, its death as a health check that failed.
    causes = [getattr(f, "cause", getattr(f, "health_check_failure", f)) for f in failures]
    most_telling_first = (lambda e: isinstance(e, StageError), is_out_of_memory, _is_worker_death)
    for is_telling in most_telling_first:
        for cause in causes:
            if is_telling(cause):
                return cause
    return causes[0] if causes else error


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's, the CPU allocator's, or Ray's memory monitor's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def _death(error: BaseException) -> str:
    """Where a worker died and why; Ray says so on later lines, its first line is generic."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    address = next((line.removeprefix("ip: ") for line in lines if line.startswith("ip: ")), "")
    reasons = [line.partition(". ")[0] for line in lines if " because " in line or "was terminated" in line]
    return f"a training worker died{address and f' on {address}'}: {', '.join(reasons) or lines[0]}"


def _is_worker_death(error: BaseException) -> bool:
    return type(error).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError", "NodeDiedError")
