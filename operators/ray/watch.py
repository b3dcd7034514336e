"""Follow a Ray job to its end. Only the status endpoint says how it ended; the log is shown meanwhile.

The trigger (deferred) and the operator (not deferred) both use it, so they behave alike.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import Field

from operators.ray.client import RayJobClient
from operators.ray.holders import described, holders
from operators.ray.jobs import JobInfo, JobStatus, RayRefusedError, RayUnreachableError
from operators.ray.logs import LogRelay
from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.errors import DataError, StageError
from stages.config.heard import position
from stages.config.records import parse_record
from stages.config.text import duration

# A head behind a proxy may answer 404 for a moment while it starts; only a lost job table answers so every time.
_ABSENT_POLLS = 3
_LONGEST_PAUSE_SECONDS = 30.0
_LAST_LINES_SECONDS = 20.0
_CAPACITY_SECONDS = 30.0
_MOST_HOLDERS = 5
_QUIET_SECONDS, _LONGEST_QUIET_SECONDS = 60.0, 600.0
"""After the first of these the log says that nothing was heard, then each time after twice as long, the second at
most."""
_CURSOR_SECONDS = 2.0
_STOP_SECONDS = 30.0
_DRAIN_SECONDS = 1.0
_DRAINED_PER_SECOND = 500.0


class Log(Protocol):
    """Airflow's task logger, or any other."""

    def info(self, msg: str, /, *args: Any) -> Any: ...
    def warning(self, msg: str, /, *args: Any) -> Any: ...


@dataclass(frozen=True)
class WatchSettings:
    """How patiently to watch."""

    poll_interval: float = 1.0
    """Seconds between polls of the status endpoint."""
    unreachable_seconds: float = 300.0
    """Seconds without an answer after which the watcher gives up; the job itself is left alone."""
    progress_seconds: float = 10.0
    """Seconds between progress lines in the task log."""
    stall_seconds: float = 0.0
    """Seconds without any new line in its log after which a running job is stopped; 0 = never. Longer than the job's
    own limit, so that the job, which can log where it hangs, ends itself first."""
    capacity_seconds: float = 0.0
    """Seconds that a job may be PENDING before it is stopped; 0 = no limit."""
    asked_cpus: float = 0.0
    """CPUs that the job's own process requests."""
    asked_gpus: float = 0.0
    """GPUs that it requests."""


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
    """Watches one job. `skip` is the number of log lines that earlier watchers have shown."""

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

        self._alive_at = time.monotonic()
        self._capacity_said_at = time.monotonic()
        self._quiet_said = 0.0
        self._shortages_seen = 0

    @property
    def settled(self) -> int:
        """Lines of the log that were shown, or counted in a note about lines left out."""
        return self._relay.settled

    async def drain(self) -> None:
        """Give the last lines time to arrive.

        Airflow's triggerer sends log lines and the end of a trigger through two channels. Lines that the end overtakes
        are written to the triggerer's own log instead of the task's.
        """
        await asyncio.sleep(_DRAIN_SECONDS + self._relay.burst / _DRAINED_PER_SECOND)

    async def watch(self) -> Outcome:
        """Return when the job has ended, the cluster does not know it, or the cluster is away for too long."""
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
        answered_at = since = time.monotonic()
        absent, status = 0, None
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
                    self._alive_at = time.monotonic()
                answered_at, away = time.monotonic(), False
                absent = absent + 1 if job is None else 0
                if absent >= _ABSENT_POLLS:
                    return JobInfo(self._submission_id, JobStatus.LOST, "the cluster does not know the job any more")
                if job is not None and not job.status.is_active:
                    return job
                if job is not None and job.status is not status:
                    status, since = job.status, answered_at
                    self._alive_at = answered_at
                    self._log.info("Ray job %s: %s", self._submission_id, status.value)
                if status is JobStatus.PENDING and (ended := await self._unplaced(answered_at - since)):
                    return ended
                if status is JobStatus.RUNNING:
                    await self._say_who_holds_the_cluster()
                    if ended := await self._stalled():
                        return ended
            await self._pause()

    async def _unplaced(self, seconds: float) -> JobInfo | None:
        """Log what a pending job waits for; stop it when that takes too long."""
        now, limit = time.monotonic(), self._settings.capacity_seconds
        over = bool(limit) and seconds >= limit
        if not over and now - self._capacity_said_at < _CAPACITY_SECONDS:
            return None
        self._capacity_said_at = now
        asked = {"CPU": self._settings.asked_cpus, "GPU": self._settings.asked_gpus}
        names = [name for name, amount in asked.items() if amount or name == "CPU"]
        shortage = f"asked {' and '.join(f'{asked[name]:g} {name}' for name in names)} for the job's own process"
        with contextlib.suppress(RayUnreachableError, RayRefusedError):
            total = await self._client.cluster_resources()
            shortage += f", cluster has {' and '.join(f'{total.get(name, 0):g} {name}' for name in names)} in all"
            shortage += await self._others()
        if not over:
            self._log.info("waiting for capacity: %s", shortage)
            return None
        return await self._stop(JobStatus.UNPLACED, f"no capacity for {seconds:.0f} s: {shortage}")

    async def _say_who_holds_the_cluster(self) -> None:
        """After the job's own line that its workers find no room: the job cannot see whose the others are."""
        seen, self._shortages_seen = self._shortages_seen, self._relay.shortages
        if seen == self._relay.shortages:
            return
        with contextlib.suppress(RayUnreachableError, RayRefusedError):
            if others := await self._others():
                self._log.info("the job's workers wait for room%s", others)

    async def _others(self) -> str:
        """`; on it are: sft of llm_pipeline, run ..., for 12 min 04 s`, empty when there is no other job."""
        found = holders(await self._client.list_jobs(), submission_id=self._submission_id)
        if not found:
            return ""
        more = f"; and {len(found) - _MOST_HOLDERS} more" if len(found) > _MOST_HOLDERS else ""
        return f"; on it are: {'; '.join(described(job) for job in found[:_MOST_HOLDERS])}{more}"

    async def _stalled(self) -> JobInfo | None:
        silent, limit = time.monotonic() - self._alive_at, self._settings.stall_seconds
        self._say_quiet(silent, limit)
        if not limit or silent < limit:
            return None
        return await self._stop(JobStatus.STALLED, f"no progress and no log line for {silent:.0f} s")

    def _say_quiet(self, silent: float, limit: float) -> None:
        """A job that says nothing looks like one that works, so the log says how long it has been silent."""
        if silent < self._quiet_said:  # it has spoken since
            self._quiet_said = 0.0
        due = max(_QUIET_SECONDS, self._quiet_said + min(self._quiet_said, _LONGEST_QUIET_SECONDS))
        if silent < due or (limit and silent >= limit):
            return
        self._quiet_said = silent
        last = self._relay.progress
        where = f"; its last report was {last.get('stage', 'progress')} {position(last)}" if last else ""
        stop = f"; it is stopped after {duration(limit)} of silence" if limit else ""
        self._log.info("nothing heard from the job for %s%s%s", duration(silent), where, stop)

    async def _stop(self, status: JobStatus, message: str) -> JobInfo | None:
        """Stop the job and wait until it has ended; None when Ray does not answer: the next poll tries again."""
        self._log.warning("%s: stopping Ray job %s.", message, self._submission_id)
        try:
            await self._client.stop_job(self._submission_id)
            deadline = time.monotonic() + _STOP_SECONDS
            while (job := await self._client.get_job(self._submission_id)) and job.status.is_active:
                if time.monotonic() > deadline:
                    return None
                await asyncio.sleep(self._settings.poll_interval)
        except (RayUnreachableError, RayRefusedError) as error:
            self._log.warning("%s; trying again.", error)
            return None
        if job is not None and job.status is not JobStatus.STOPPED:
            return job
        return JobInfo(self._submission_id, status, message)

    async def _pause(self) -> None:
        """Wait for the poll interval, or until the log has ended, which often means that the job has."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._settings.poll_interval)
        self._wake.clear()

    async def _tail(self) -> None:
        pause, problem_shown = 1.0, False
        while not self._ended:
            before = self._relay.seen
            try:
                async for text in self._client.tail_logs(self._submission_id):
                    seen = self._relay.seen
                    self._relay.feed(text)
                    if self._relay.seen > seen:
                        self._alive_at = time.monotonic()
            except (RayUnreachableError, RayRefusedError) as error:
                if not problem_shown:
                    self._log.warning("The live log is interrupted (%s); it will be picked up again.", error)
                problem_shown = True
                self._alive_at = time.monotonic()  # while it is not read, it cannot count as silent
            self._wake.set()
            pause = 1.0 if self._relay.seen > before else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)
            self._relay.restart()

    async def _show_last_lines(self) -> None:
        try:
            whole = await asyncio.wait_for(self._client.get_logs(self._submission_id), _LAST_LINES_SECONDS)
        except (RayUnreachableError, RayRefusedError, TimeoutError) as error:
            self._log.warning("The log's last lines could not be fetched: %s", error)
        else:
            self._relay.finish(whole)


class _Shown(Config):
    """What a LogCursor keeps."""

    submission_id: str
    lines: int = Field(ge=0)


class LogCursor:
    """How many lines of a job's log have been shown, kept where the next triggerer finds it."""

    def __init__(self, store_uri: str, key: str, submission_id: str) -> None:
        self._store_uri, self._key, self._submission_id = store_uri, key, submission_id
        self._saved = 0

    def _store(self) -> Store:
        return open_store(self._store_uri)

    def load(self) -> int:
        if not self._key:
            return 0
        store = self._store()
        if not store.exists(self._key):
            return 0
        try:
            kept = parse_record(_Shown, store.read_bytes(self._key), self._key)
        except DataError:
            return 0  # showing lines twice is better than never
        self._saved = kept.lines if kept.submission_id == self._submission_id else 0
        return self._saved

    def save(self, lines: int) -> None:
        if self._key and lines != self._saved:
            write_json(self._store(), self._key, {"submission_id": self._submission_id, "lines": lines})
            self._saved = lines

    async def follow(self, watcher: JobWatcher, logger: Log) -> None:
        """Save the watcher's position, always one interval late: a line handed to Airflow's logging passes through
        another process, and is lost when that is killed. Showing a line twice is better than never."""
        settled = self._saved
        while True:
            await asyncio.sleep(_CURSOR_SECONDS)
            try:
                await asyncio.to_thread(self.save, settled)
            except (OSError, StageError) as error:
                logger.warning("Log position not saved (%s): a new watcher would show lines again.", error)
            settled = watcher.settled


async def watch_job(
    client: RayJobClient,
    submission_id: str,
    *,
    cursor: LogCursor,
    logger: Log,
    settings: WatchSettings,
    on_mlflow_run: Callable[[dict[str, Any]], None] = lambda run: None,
    drain: bool = False,
) -> Outcome:
    """Watch a job to its end, continuing in its log where an earlier watcher of the same job had stopped.

    `drain` is for triggers, see JobWatcher.
    """
    watcher = JobWatcher(
        client,
        submission_id,
        logger=logger,
        settings=settings,
        skip=await asyncio.to_thread(cursor.load),
        on_mlflow_run=on_mlflow_run,
    )
    keeper = asyncio.create_task(cursor.follow(watcher, logger))
    try:
        outcome = await watcher.watch()
        if drain:
            await watcher.drain()
        return outcome
    finally:
        keeper.cancel()
