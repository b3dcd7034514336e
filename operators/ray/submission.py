"""Exactly one Ray job per attempt: deterministic ids, remembered before the POST, get-or-create.

The id of a job is a function of the task instance and a generation. A generation is used up (`consumed`) when its
outcome has been processed; until then every new attempt of the task attaches to the same job, whichever process died.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

from operators.ray.hook import RayJobHook
from operators.ray.jobs import JobExistsError, JobInfo, JobStatus, RayUnreachableError

STATE_KEY = "ray_job"
OUT_OF_MEMORY_KEY = "out_of_memory"
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0

logger = logging.getLogger(__name__)


class StateStore(Protocol):
    """Airflow's task state store: survives retries, unlike XCom."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def set(self, key: str, value: Any, *, retention: timedelta | None = None) -> None: ...


@dataclass(frozen=True)
class TaskKey:
    """Identifies a task instance across its attempts."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1
    airflow: str = ""
    """Name of this Airflow, see `operators.ray.ownership`: DAGs and scheduled runs of others have the same ids."""

    def submission_id(self, generation: int) -> str:
        """`athanor-sft-1f0c2a9d4be7-1`: readable, and the same in every process that computes it."""
        identity = json.dumps([self.airflow, self.dag_id, self.run_id, self.task_id, self.map_index])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        task = re.sub(r"[^A-Za-z0-9_-]+", "-", self.task_id)[:40]
        return f"athanor-{task}-{digest}-{generation}"


@dataclass(frozen=True)
class Submission:
    """The record in the task state store."""

    submission_id: str
    generation: int
    try_number: int
    """Attempt that submitted the job; a later attempt that finds the job has re-attached."""
    consumed: bool = False
    taken_in: int | None = None
    """`clear_number` of the DAG run in which a success was taken; None for every other outcome."""

    def is_open_in(self, clear_number: int) -> bool:
        """Whether the next attempt takes this job's outcome instead of starting a new job.

        Airflow records a success only after the task has taken it. If the process dies in between, or a new scheduler
        adopts the task, Airflow makes another attempt, which takes the same success again. A clear is different: a
        user asks for a new job. It raises the run's `clear_number`.
        """
        return not self.consumed or self.taken_in == clear_number


class SubmissionLog:
    """The task's submissions in the task state store, which keeps only the last one."""

    def __init__(self, store: StateStore, key: TaskKey, *, retention: timedelta | None) -> None:
        self._store, self._key, self._retention = store, key, retention

    def last(self) -> Submission | None:
        kept = self._store.get(STATE_KEY)
        return Submission(**kept) if isinstance(kept, dict) else None

    def open(self, generation: int, try_number: int) -> Submission:
        """Remember a submission that is about to be made."""
        submission = Submission(self._key.submission_id(generation), generation, try_number)
        self._store.set(STATE_KEY, asdict(submission), retention=self._retention)
        return submission

    def consume(self, submission: Submission, *, taken_in: int | None = None) -> None:
        """The outcome has been processed: the next attempt starts a new job, see `Submission.is_open_in`."""
        self._store.set(
            STATE_KEY, asdict(replace(submission, consumed=True, taken_in=taken_in)), retention=self._retention
        )

    def out_of_memory_failures(self) -> int:
        """How often the task ran out of memory, over all its attempts."""
        return int(self._store.get(OUT_OF_MEMORY_KEY, 0))

    def count_out_of_memory(self) -> None:
        count = self.out_of_memory_failures() + 1
        self._store.set(OUT_OF_MEMORY_KEY, count, retention=self._retention)


@dataclass(frozen=True)
class Attached:
    """A job that exists; `job` is None right after its submission."""

    submission: Submission
    job: JobInfo | None
    reattached: bool


def attach_or_submit(
    log: SubmissionLog,
    hook: RayJobHook,
    *,
    try_number: int,
    clear_number: int,
    prepare: Callable[[Submission], None],
    post: Callable[[Submission], None],
    patience_seconds: float,
) -> Attached:
    """Attach to the job of an earlier attempt if its outcome is still open, otherwise submit one.

    `prepare` is called once per submission, `post` repeatedly while Ray does not answer: the job may already run by
    then. Raises RayUnreachableError when Ray stays away for `patience_seconds`.
    """
    last = log.last()
    if last is not None and last.is_open_in(clear_number):
        job = patiently(lambda: hook.get_job(last.submission_id), patience_seconds)
        if job is not None and (job.status.is_active or job.status is JobStatus.SUCCEEDED):
            logger.info("Attaching to Ray job %s (%s) of attempt %d.", job.submission_id, job.status, last.try_number)
            return Attached(last, job, reattached=True)
        if job is None:
            # Nothing was ever started under this id (a crash before the POST), or the head lost its job table.
            submission = log.open(last.generation, try_number)
        else:
            logger.info(
                "Ray job %s of attempt %d ended as %s; starting anew.", job.submission_id, last.try_number, job.status
            )
            submission = log.open(last.generation + 1, try_number)
    else:
        submission = log.open(last.generation + 1 if last else 1, try_number)
    return _submit(log, hook, submission, prepare=prepare, post=post, patience_seconds=patience_seconds)


def _submit(
    log: SubmissionLog,
    hook: RayJobHook,
    submission: Submission,
    *,
    prepare: Callable[[Submission], None],
    post: Callable[[Submission], None],
    patience_seconds: float,
) -> Attached:
    posts = 0

    def counted_post() -> None:
        nonlocal posts
        posts += 1
        post(submission)

    while True:
        prepare(submission)
        try:
            patiently(counted_post, patience_seconds)
            return Attached(submission, None, reattached=False)
        except JobExistsError:
            submission_id = submission.submission_id
            job = patiently(lambda: hook.get_job(submission_id), patience_seconds)  # noqa: B023 - called at once
            if job is not None and (job.status.is_active or posts > 1):
                # An earlier POST arrived and only its answer was lost: this is our job.
                return Attached(submission, job, reattached=False)
            logger.info("Ray knows %s already, and it has ended; using the next id.", submission_id)
            submission, posts = log.open(submission.generation + 1, submission.try_number), 0


def patiently(call: Callable[[], Any], patience_seconds: float) -> Any:
    """Repeat a call that is safe to repeat while Ray does not answer."""
    started, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except RayUnreachableError as error:
            if time.monotonic() - started + pause > patience_seconds:
                raise
            logger.warning("%s; trying again in %.0f s.", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
