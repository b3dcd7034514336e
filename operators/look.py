"""The look at a run's given models and benchmarks, in the task `resolve`: a short Ray job, because they lie where jobs
run. It also opens the sealed keys of endpoints, which only Ray's side can tell to be possible.

It is submitted, attached to again and watched as the job of a stage is. The task waits in its own process, and stops
the job when it is killed: nothing is lost with it.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from operators.failures import (
    StageFailed,
    StageInfrastructureFailed,
    as_stage_failures,
    ended_while_waiting,
)
from operators.ray.hook import DEFAULT_CONN_ID, RayJobHook
from operators.ray.jobs import JobStatus
from stages.config.endpoint_keys import keyed_endpoints_of_run
from stages.config.errors import DataError
from stages.config.look import Look, LookRequest, given_benchmarks, given_models, look_key
from stages.config.records import parse_record

if TYPE_CHECKING:
    from operators.ray.watch import Outcome, WatchSettings
    from stages.artifacts.store import Store
    from stages.config.pipeline import PipelineConfig
    from stages.config.request import RunInfo

logger = logging.getLogger(__name__)

ENTRYPOINT = "python -m stages.look {config_uri}"
_UNREACHABLE_SECONDS = 300.0
_LONGEST_WAIT_SECONDS = 1800.0
"""For room on the cluster; the task's own time is longer."""
_KILL_PATIENCE_SECONDS = 20.0
_STARTS_ANEW = "The next attempt looks again."


def look_at_models(
    context: Any, store: "Store", run: "RunInfo", config: "PipelineConfig", *, entrypoint: str = ENTRYPOINT
) -> Look:
    """Return what is known of the models and benchmarks that a run is given; without any, and without keys of endpoints
    from connections, no job is started.

    Raises StageConfigFailed or StageDataFailed, as the stages would, for what one of them would refuse.
    """
    models, benchmarks, keyed = given_models(config), given_benchmarks(config), keyed_endpoints_of_run(config)
    if not models and not benchmarks and not keyed:
        return Look()
    # As `tokenize`, the first stage that reads them.
    execution = config.execution.tokenize
    wait = min(execution.capacity_seconds or _LONGEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS)
    request = LookRequest(
        run=run,
        store_uri=store.root_uri,
        config=config.model_dump(mode="json"),
        models=models,
        execution=execution.model_copy(update={"capacity_seconds": wait}),
        try_number=context["ti"].try_number,
    )
    named = [*(f"{model.role}={model.uri!r}" for model in models), *(f"benchmarks={uri!r}" for uri in benchmarks)]
    named += [f"{one.field}={one.connection!r}" for one in keyed]
    logger.info("Looking at %s.", ", ".join(named))
    outcome = _watched(context, store, request, entrypoint=entrypoint)
    with as_stage_failures(execution.max_retries):
        if outcome.status != JobStatus.SUCCEEDED:
            raise _explained(request, store, outcome)
        try:
            look = _result(store, run)
        except FileNotFoundError:
            raise StageInfrastructureFailed(
                f"Ray job {outcome.submission_id} succeeded, but "
                f"{store.root_uri}/{look_key(run.run_id, 'result.json')} does not exist.",
                advice="Check that Airflow and the Ray cluster see the same ARTIFACT_STORE.",
                max_retries=execution.max_retries,
            ) from None
    for known in look.benchmarks:
        logger.info("%s", known.summary())
    for facts in look.models:
        logger.info("%s", facts.summary())
        for warning in facts.warnings:
            logger.warning("%s", warning)
    return look


def read_look(store: "Store", run: "RunInfo") -> Look:
    """What `resolve` found out about the given models; nothing where it did not look, or the record is damaged."""
    try:
        return _result(store, run)
    except FileNotFoundError:
        return Look()
    except DataError as error:
        logger.warning("%s The plan goes on without it.", error.message)
        return Look()


def _result(store: "Store", run: "RunInfo") -> Look:
    key = look_key(run.run_id, "result.json")
    return parse_record(Look, store.read_bytes(key), f"{store.root_uri}/{key}")


def _watched(context: Any, store: "Store", request: LookRequest, *, entrypoint: str) -> "Outcome":
    """Attach to the job of an earlier attempt or submit one, show its log, and return how it ended."""
    from operators.dispatch import attach, clear_number, cursor_key, outcome_of, submission_log, watch_settings

    settings = watch_settings(
        request, poll_interval=0.5, unreachable_seconds=_UNREACHABLE_SECONDS, progress_seconds=10.0
    )
    with as_stage_failures(request.execution.max_retries), RayJobHook(DEFAULT_CONN_ID) as hook:
        with _stopping_when_killed(hook) as guard:
            attached = attach(
                context,
                hook,
                store,
                request,
                entrypoint=entrypoint,
                cancel_on_kill=True,
                patience_seconds=_UNREACHABLE_SECONDS,
                on_submit=guard.watch_over,
            )
            submission = attached.submission
            guard.watch_over(submission.submission_id)
            if submission.consumed:
                return outcome_of(attached)
            watch = _watch(hook, submission.submission_id, request.store_uri, cursor_key(request), settings)
            outcome = guard.run(watch)
        if outcome.status != JobStatus.UNREACHABLE:
            taken_in = clear_number(context) if outcome.status == JobStatus.SUCCEEDED else None
            submission_log(context).consume(submission, taken_in=taken_in)
    if outcome.status == JobStatus.STOPPED and attached.reattached:
        logger.info("The job was stopped together with an earlier attempt; looking again.")
        return _watched(context, store, request, entrypoint=entrypoint)
    return outcome


async def _watch(
    hook: RayJobHook, submission_id: str, store_uri: str, cursor: str, settings: "WatchSettings"
) -> "Outcome":
    from operators.ray.client import RayJobClient
    from operators.ray.watch import LogCursor, watch_job

    async with RayJobClient(hook.endpoint) as client:
        shown = LogCursor(store_uri, cursor, submission_id)
        return await watch_job(client, submission_id, cursor=shown, logger=logger, settings=settings)


class _Killed(BaseException):
    """This process was asked to end; no `except Exception` on the way takes it."""


class _Guard:
    """Ends what this process does when it is asked to end (SIGTERM)."""

    def __init__(self) -> None:
        self.job: str | None = None
        self._watching: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._killed = False

    def watch_over(self, submission_id: str) -> None:
        self.job = submission_id

    def run(self, watch: Coroutine[Any, Any, "Outcome"]) -> "Outcome":
        """Run `watch` in an event loop. A signal cancels it, since a task of asyncio keeps what is raised in it."""

        async def cancellable() -> "Outcome":
            task = asyncio.current_task()
            assert task is not None
            self._watching = (asyncio.get_running_loop(), task)
            return await watch

        try:
            return asyncio.run(cancellable())
        finally:
            self._watching = None
            if self._killed:
                raise _Killed

    def on_signal(self, signum: int, frame: Any) -> None:
        self._killed = True
        if self._watching is None:
            raise _Killed
        loop, task = self._watching
        with contextlib.suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(task.cancel)


@contextlib.contextmanager
def _stopping_when_killed(hook: RayJobHook) -> Iterator[_Guard]:
    """Yield a guard: the job it watches over is stopped when this process is asked to end, or runs out of time."""
    from operators.ray.submission import patiently

    guard = _Guard()
    # Airflow's own handler calls `on_kill`, which a function that is a task does not have.
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, guard.on_signal) if on_main_thread else None
    try:
        yield guard
    except BaseException as error:
        # Airflow's time limit is no Exception. What is one leaves the job to the next attempt, which attaches to it.
        if guard.job and not isinstance(error, Exception):
            job = guard.job
            patiently(lambda: hook.stop_job(job), _KILL_PATIENCE_SECONDS)
            logger.info("Stopped Ray job %s.", job)
        if isinstance(error, _Killed):
            raise ended_while_waiting() from None
        raise
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)


def _explained(request: LookRequest, store: "Store", outcome: "Outcome") -> StageFailed:
    """Why there is no result; the job's own `failure.json` knows best."""
    from operators.failures import job_failure
    from operators.results import explain_failure, told_failure
    from stages.config.graph import Stage

    max_retries = request.execution.max_retries
    if outcome.status == JobStatus.FAILED:
        told = told_failure(store, look_key(request.run.run_id, "failure.json"), max_retries=max_retries)
        return told or job_failure(outcome.job, Stage.TOKENIZE, max_retries=max_retries)
    failed = explain_failure(Stage.TOKENIZE, run=request.run, store=store, outcome=outcome, max_retries=max_retries)
    return type(failed)(failed.message, advice=_STARTS_ANEW, max_retries=max_retries)
