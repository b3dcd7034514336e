"""Follow a Ray job to its end. The status endpoint alone says how it ended; the log is shown beside it.

Used by the trigger (deferred) and by the operator (not deferred), so both behave alike.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from operators.client import RayJobClient
from operators.jobs import JobInfo, JobStatus, RayRefusedError, RayUnreachableError
from operators.logs import LogRelay

# A head behind a proxy can answer 404 for a moment while it starts; a job table that is gone stays gone.
_ABSENT_POLLS = 3
_LONGEST_PAUSE_SECONDS = 30.0
_LAST_LINES_SECONDS = 20.0


class Log(Protocol):
    """Airflow's task logger, or any other."""

    def info(self, msg: str, /, *args: Any) -> Any: ...
    def warning(self, msg: str, /, *args: Any) -> Any: ...


@dataclass(frozen=True)
class WatchSettings:
    """How patiently to watch."""

    poll_interval: float = 1.0
    """Seconds between looks at the status endpoint."""
    unreachable_seconds: float = 300.0
    """Seconds without an answer after which the watcher gives up; the job itself is left alone."""
    progress_seconds: float = 10.0
    """Seconds between progress lines in the task log."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended, as far as the watcher could tell; JSON-able, because it travels as a trigger event."""

    submission_id: str
    status: str
    message: str = ""
    error_type: str | None = None
    exit_code: int | None = None
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    ended_at: float = 0.0
    """Wall-clock time at which the end was seen, to measure how long the task takes to react."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def job(self) -> JobInfo:
        return JobInfo(self.submission_id, JobStatus(self.status), self.message, self.error_type, self.exit_code)


class JobWatcher:
    """Watches one job; `seen` lines of its log have been shown, also across watchers when `skip` is given."""

    def __init__(
        self,
        client: RayJobClient,
        submission_id: str,
        *,
        logger: Log,
        settings: WatchSettings,
        skip: int = 0,
        on_mlflow_run: Callable[[dict[str, Any]], None] = lambda run: None,
    ) -> None:
        self._client = client
        self._submission_id = submission_id
        self._log = logger
        self._settings = settings
        self._ended = False
        self._wake = asyncio.Event()
        self._relay = LogRelay(
            logger.info, skip=skip, progress_seconds=settings.progress_seconds, on_mlflow_run=on_mlflow_run
        )
        if skip:
            logger.info("Watching job %s again; its first %d log lines were shown before.", submission_id, skip)

    @property
    def seen(self) -> int:
        return self._relay.seen

    async def watch(self) -> Outcome:
        """Return when the job has ended, is unknown to the cluster, or the cluster is away for too long."""
        tail = asyncio.create_task(self._tail())
        try:
            job = await self._poll_until_ended()
        finally:
            self._ended = True
            tail.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await tail
        ended_at = time.time()
        if job.status not in (JobStatus.LOST, JobStatus.UNREACHABLE):
            await self._show_last_lines()
        self._log.info("Ray job %s: %s", self._submission_id, job.status.value)
        run = self._relay.mlflow_run or {}
        return Outcome(
            submission_id=self._submission_id,
            status=job.status.value,
            message=job.message[-4000:],
            error_type=job.error_type,
            exit_code=job.exit_code,
            mlflow_run_id=run.get("run_id"),
            mlflow_experiment_id=run.get("experiment_id"),
            ended_at=ended_at,
        )

    async def _poll_until_ended(self) -> JobInfo:
        answered_at, absent, status = time.monotonic(), 0, None
        away = False
        while True:
            try:
                job = await self._client.get_job(self._submission_id)
            except (RayUnreachableError, RayRefusedError) as error:
                seconds = time.monotonic() - answered_at
                if seconds >= self._settings.unreachable_seconds:
                    return JobInfo(
                        self._submission_id, JobStatus.UNREACHABLE, f"no answer for {seconds:.0f} s: {error}"
                    )
                if not away:
                    self._log.warning("%s; will ask again for %.0f s.", error, self._settings.unreachable_seconds)
                away = True
            else:
                if away:
                    self._log.info("Ray answers again.")
                answered_at, away = time.monotonic(), False
                absent = absent + 1 if job is None else 0
                if absent >= _ABSENT_POLLS:
                    return JobInfo(self._submission_id, JobStatus.LOST, "the cluster does not know the job any more")
                if job is not None and not job.status.is_active:
                    return job
                if job is not None and job.status is not status:
                    status = job.status
                    self._log.info("Ray job %s: %s", self._submission_id, status.value)
            await self._pause()

    async def _pause(self) -> None:
        """Wait for the poll interval, or until the log has ended, which often means that the job has."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._settings.poll_interval)
        self._wake.clear()

    async def _tail(self) -> None:
        pause, problem_shown = 1.0, False
        while not self._ended:
            before = self.seen
            try:
                async for text in self._client.tail_logs(self._submission_id):
                    self._relay.feed(text)
            except (RayUnreachableError, RayRefusedError) as error:
                if not problem_shown:
                    self._log.warning("The live log is interrupted (%s); it will be picked up again.", error)
                problem_shown = True
            self._wake.set()
            pause = 1.0 if self.seen > before else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)
            self._relay.restart()

    async def _show_last_lines(self) -> None:
        try:
            whole = await asyncio.wait_for(self._client.get_logs(self._submission_id), _LAST_LINES_SECONDS)
        except (RayUnreachableError, RayRefusedError, TimeoutError) as error:
            self._log.warning("The log's last lines could not be fetched: %s", error)
        else:
            self._relay.finish(whole)
