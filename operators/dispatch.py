"""From a stage's request to its Ray job: attach to the job of an earlier attempt or submit one, and what is carried
until it ends.

Imported when a task runs, never when a DAG is read: it needs the asynchronous client.
"""

import logging
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from airflow.sdk.execution_time.context import NEVER_EXPIRE

from operators.endpoint import sealed_environment
from operators.ray.hook import RayJobHook
from operators.ray.ownership import GENERATION, airflow_id, job_metadata
from operators.ray.submission import Attached, Submission, SubmissionLog, TaskKey, attach_or_submit
from operators.ray.watch import Outcome, WatchSettings
from stages.artifacts.store import Store
from stages.config.execution import LOCAL_CPUS, ExecutionConfig
from stages.config.gate_records import GateRequest
from stages.config.graph import GRAPH, Stage
from stages.config.look import LookRequest
from stages.config.request import REQUEST_DIGEST, RunInfo, StageRequest, sha256_of

logger = logging.getLogger(__name__)

JobRequest = StageRequest | LookRequest | GateRequest
"""What a job is asked to do; each has a folder of its own under the run's."""

_STALL_MARGIN_SECONDS = 120.0
"""A job that hangs ends itself, with its stacks in the log; the watcher waits this much longer before it does."""

# Set in front of the entrypoint rather than in a runtime environment: jobs that have one cannot use Ray's warm workers.
_JOB_ENVIRONMENT = {"RAY_COLOR_PREFIX": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


@dataclass(frozen=True)
class Carried:
    """What an attempt knows about its job. It travels through the trigger, and comes back when the job has ended.

    Its JSON form lies in Airflow's database for as long as a task is deferred, that is for days: tasks that an earlier
    version deferred must be able to resume, so fields are added with a default and never renamed.
    """

    run: RunInfo
    submission: Submission
    reattached: bool
    """The job was submitted by an earlier attempt."""
    max_retries: int
    micro_batch_size: int
    links: dict[str, str]
    """Addresses of the buttons on the task's page, by XCom key."""

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run.model_dump(mode="json", exclude={"records"}),  # the next attempt has them from `resolve`
            "submission": asdict(self.submission),
            "reattached": self.reattached,
            "max_retries": self.max_retries,
            "micro_batch_size": self.micro_batch_size,
            "links": dict(self.links),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Carried":
        return cls(
            run=RunInfo.model_validate(data["run"]),
            submission=Submission(**data["submission"]),
            reattached=data["reattached"],
            max_retries=data["max_retries"],
            micro_batch_size=data["micro_batch_size"],
            links=dict(data["links"]),
        )


def attach(
    context: Any,
    hook: RayJobHook,
    store: Store,
    request: JobRequest,
    *,
    entrypoint: str,
    cancel_on_kill: bool,
    patience_seconds: float,
    on_submit: Callable[[str], None],
) -> Attached:
    """Attach to the job of an earlier attempt if its outcome is still open, otherwise submit one.

    `on_submit` gets the submission id right before the POST: from then on there may be a job to stop.
    """
    ti = context["ti"]
    # What Ray's dashboard shows about the job, and how the reaper recognises it; nothing secret.
    metadata = {
        "athanor.stage": request.name,
        "athanor.run_id": request.run.run_id,
        **job_metadata(
            airflow_id(),
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=_map_index(ti),
            try_number=ti.try_number,
            cancel_on_kill=cancel_on_kill,
        ),
    }

    def key(name: str) -> str:
        return f"runs/{request.run.run_id}/{request.name}/{name}"

    written: dict[str, str] = {}
    environment: dict[str, dict[str, str]] = {}

    def prepare(submission: Submission) -> None:
        # First, so that nothing is written where a connection is not as it should be.
        environment[submission.submission_id] = sealed_environment(request, job=submission.submission_id)
        complete = request.model_copy(update={"submission_id": submission.submission_id})
        for stale in ("result.json", "failure.json"):
            store.delete(key(stale))
        data = complete.model_dump_json(indent=1).encode()
        store.write_bytes(key("config.json"), data)
        written[submission.submission_id] = sha256_of(data)

    def post(submission: Submission) -> None:
        on_submit(submission.submission_id)
        hook.submit_job(
            submission_id=submission.submission_id,
            entrypoint=job_command(
                entrypoint, f"{store.root_uri}/{key('config.json')}", digest=written[submission.submission_id]
            ),
            metadata={**metadata, GENERATION: str(submission.generation)},
            num_cpus=entrypoint_cpus(request),
            num_gpus=entrypoint_gpus(request),
            # A runtime environment, which Ray's workers of the job inherit; what `env` sets they do not see.
            env_vars=environment[submission.submission_id],
        )
        logger.info("Submitted Ray job %s.", submission.submission_id)

    return attach_or_submit(
        submission_log(context),
        hook,
        try_number=request.try_number,
        clear_number=clear_number(context),
        prepare=prepare,
        post=post,
        patience_seconds=patience_seconds,
    )


def job_command(entrypoint: str, config_uri: str, *, digest: str) -> str:
    """The shell command of the job; a URI from a form cannot break out of it. `digest` is that of the request: what the
    job does is decided here, and not by whoever else may write to the store."""
    settings = " ".join(f"{name}={value}" for name, value in {**_JOB_ENVIRONMENT, REQUEST_DIGEST: digest}.items())
    return f"env {settings} {entrypoint.format(config_uri=shlex.quote(config_uri))}"


def submission_log(context: Any) -> SubmissionLog:
    """The submissions of this task instance, over all its attempts."""
    ti = context["ti"]
    key = TaskKey(ti.dag_id, ti.run_id, ti.task_id, _map_index(ti), airflow=airflow_id())
    return SubmissionLog(context["task_state_store"], key, retention=NEVER_EXPIRE)


def clear_number(context: Any) -> int:
    """How often tasks of this run were cleared; retries and restarts do not count."""
    return context["dag_run"].clear_number or 0


def within_memory(execution: ExecutionConfig, *, stage: Stage, log: SubmissionLog) -> ExecutionConfig:
    """Halve the micro-batch once for each time the task ran out of memory; the global batch stays as it is."""
    failures = log.out_of_memory_failures()
    configured = execution.micro_batch_size
    effective = max(1, configured // 2**failures)
    if effective == configured:
        return execution
    logger.info(
        "Out of memory %d times so far: execution.%s.micro_batch_size is %d instead of %d; results do not change.",
        failures,
        stage.value,
        effective,
        configured,
    )
    return execution.model_copy(update={"micro_batch_size": effective})


def watch_settings(
    request: JobRequest, *, poll_interval: float, unreachable_seconds: float, progress_seconds: float
) -> WatchSettings:
    """How to watch the stage's job, in the triggerer and in the task's own process alike."""
    execution = request.execution
    return WatchSettings(
        poll_interval=poll_interval,
        unreachable_seconds=unreachable_seconds,
        progress_seconds=progress_seconds,
        stall_seconds=execution.stall_seconds and execution.stall_seconds + _STALL_MARGIN_SECONDS,
        # For its turn on a machine a job waits as long as the task may, as it would for a slot of the pool.
        capacity_seconds=0.0 if _cpus_of_turn(request) else execution.capacity_seconds,
        asked_cpus=entrypoint_cpus(request),
        asked_gpus=entrypoint_gpus(request),
    )


def entrypoint_cpus(request: JobRequest) -> float:
    """Cores that the job's own process reserves."""
    return max(request.execution.entrypoint_cpus, _cpus_of_turn(request))


def _cpus_of_turn(request: JobRequest) -> float:
    """On a cluster that is one machine, the cores of which a heavy job in its own process takes its turn: threads of
    two such jobs on the same cores would wait for each other at every barrier. 0 elsewhere, and for light jobs."""
    cpus = float(os.environ.get(LOCAL_CPUS) or 0)
    if isinstance(request, LookRequest) or not GRAPH[request.stage].heavy or request.execution.train_workers:
        return 0.0
    return min(request.execution.cpus_per_worker, cpus)


def entrypoint_gpus(request: JobRequest) -> float:
    """GPUs of the job's own process: a gate measures there, on one such as a worker of the stage has."""
    return min(1.0, request.execution.gpus_per_worker) if isinstance(request, GateRequest) else 0.0


def cursor_key(request: JobRequest) -> str:
    """Where the store keeps how much of the job's log was shown."""
    return f"runs/{request.run.run_id}/{request.name}/log.json"


def outcome_of(attached: Attached) -> Outcome:
    """The outcome of a job whose outcome, and log, were processed before."""
    job = attached.job
    if job is None:
        raise AssertionError("a job that has ended is known")
    return Outcome(job.submission_id, job.status.value, job.message, job.error_type, job.exit_code)


def of_mapped(run: RunInfo, map_index: int | None) -> RunInfo:
    """Give each instance of a mapped task its own folder under `runs/`."""
    if map_index is None or map_index < 0:
        return run
    return run.model_copy(update={"run_id": f"{run.run_id}.{map_index}"})


def _map_index(ti: Any) -> int:
    return -1 if ti.map_index is None else ti.map_index
