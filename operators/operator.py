"""One pipeline stage as an Airflow task: find its artifact, else run it as a Ray job and wait without a worker slot.

At parse time a StageOperator is a name and a few settings; everything else is imported and happens in `execute`. What
crosses to Ray is one JSON document in the object store, and what comes back is another.
"""

import asyncio
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, AirflowTaskTimeout, TaskDeferralTimeout

from operators.failures import (
    StageConfigFailed,
    StageOutOfMemory,
    StageOutOfMemoryForGood,
    StagePreempted,
    StageTimedOut,
    as_stage_failures,
)
from operators.links import ArtifactLink, MlflowRunLink, RayJobLink, ReportLink, mlflow_run_page
from operators.ray.hook import DEFAULT_CONN_ID, RayJobHook
from operators.ray.jobs import JobStatus
from stages.config.graph import GRAPH, Stage
from stages.config.request import RunInfo, StageRequest, StageResult

if TYPE_CHECKING:
    from operators.ray.submission import Attached, Submission, SubmissionLog
    from operators.ray.watch import Outcome, WatchSettings
    from stages.artifacts.store import Store
    from stages.config.execution import ExecutionConfig
    from stages.config.pipeline import PipelineConfig

ENTRYPOINT = "python -m stages {config_uri}"

_KILL_PATIENCE_SECONDS = 20.0
_STALL_MARGIN_SECONDS = 120.0
"""A job that hangs ends itself, with its stacks in the log; this is how much later the watcher does it."""

_GOES_ON = frozenset({None, "scheduled", "queued", "running", "deferred", "up_for_retry"})
"""States of a task whose job is of use when its process is asked to end: it is still, or again, Airflow's own to run.
After a clear it is `restarting`, after a mark it has ended."""

# Set in front of the entrypoint rather than in a runtime environment: jobs that have one cannot use Ray's warm workers.
_JOB_ENVIRONMENT = {"RAY_COLOR_PREFIX": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


class StageOperator(BaseOperator):
    """Run one stage and return its ArtifactRef as JSON.

    The task `resolve_task_id` returned the RunInfo; inputs come from the tasks named like the stages that GRAPH says.
    `timeout` bounds the job's time and stops the job; Airflow's own `execution_timeout` does so too, but does not count
    deferred time.
    Give it `retries=MAX_RETRIES` and a StageRetryPolicy.
    """

    template_fields: Sequence[str] = ("store_uri", "entrypoint", "ray_conn_id")
    ui_color = "#d7e8f7"

    def __init__(
        self,
        *,
        stage: Stage | str,
        task_id: str | None = None,
        ray_conn_id: str = DEFAULT_CONN_ID,
        resolve_task_id: str = "resolve",
        approve_task_id: str = "approve",
        store_uri: str = "",
        entrypoint: str = ENTRYPOINT,
        deferrable: bool = True,
        poll_interval: float = 1.0,
        unreachable_seconds: float = 300.0,
        progress_seconds: float = 10.0,
        timeout: timedelta | None = None,
        cancel_on_kill: bool = True,
        **kwargs: Any,
    ) -> None:
        spec = GRAPH[Stage(stage)]
        if spec.asset:
            kwargs.setdefault("outlets", [Asset(name=spec.asset, group="llm")])
        super().__init__(task_id=task_id or spec.stage.value, **kwargs)
        self.stage = spec.stage.value
        self.ray_conn_id = ray_conn_id
        self.resolve_task_id = resolve_task_id
        self.approve_task_id = approve_task_id
        self.store_uri = store_uri
        self.entrypoint = entrypoint
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.unreachable_seconds = unreachable_seconds
        self.progress_seconds = progress_seconds
        self.timeout = timeout
        self.cancel_on_kill = cancel_on_kill
        report_link = (ReportLink(),) if spec.stage is Stage.REPORT else ()
        self.operator_extra_links = (RayJobLink(), MlflowRunLink(), ArtifactLink(), *report_link)
        self.link_addresses: dict[str, str] = {}
        self._running: str | None = None
        self._waiting_as: Any = None
        self._terminated = False

    def execute(self, context: Any) -> dict[str, Any]:
        from operators.metrics import failures_counted

        with failures_counted(self.stage, ti=context["ti"]):
            return self._execute_in_time(context)

    def _execute_in_time(self, context: Any) -> dict[str, Any]:
        try:
            return self._execute(context)
        except AirflowTaskTimeout:
            raise self._timed_out(context, self._time_limit()) from None

    def _execute(self, context: Any) -> dict[str, Any]:
        from operators.mlflow import note_hit
        from operators.prepare import find_hit

        with as_stage_failures():
            run, store = self._run(context), self._open_store()
            request = self._request(context, run=run, store=store)
            run, max_retries = request.run, request.execution.max_retries
        with as_stage_failures(max_retries):
            if hit := find_hit(store, request):
                note_hit(run, self.stage, hit.artifact)
                return self._finish(context, run, hit)
            with RayJobHook(self.ray_conn_id) as hook:
                attached = self._attach_or_submit(context, hook, store, request)
                submission_id = attached.submission.submission_id
                self._running = submission_id
                self._push_link(context, RayJobLink(), hook.endpoint.job_page(submission_id))
        carry = {
            "run": run.model_dump(mode="json"),
            "submission": asdict(attached.submission),
            "reattached": attached.reattached,
            "max_retries": max_retries,
            "micro_batch_size": request.execution.micro_batch_size,
            "links": self.link_addresses,
        }
        if self._terminated:
            raise _preempted(max_retries)
        if attached.submission.consumed:
            outcome = _outcome_of(attached)
        else:
            # One that ended before anybody watched is processed here and now, a failure included, its log too.
            ended = attached.job is not None and not attached.job.status.is_active
            if self.deferrable and not ended:
                self._defer(request, carry)
            with as_stage_failures(max_retries):
                outcome = self._wait(context, submission_id, request)
        return self.execute_complete(context, {**outcome.to_json(), "carry": carry})

    def execute_complete(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:
        """Turn the end of the job into the end of the task."""
        from operators.ray.submission import Submission
        from operators.ray.watch import Outcome
        from operators.results import explain_failure, read_result

        carry = event["carry"]
        self.link_addresses = dict(carry["links"])
        run, max_retries = RunInfo.model_validate(carry["run"]), carry["max_retries"]
        outcome = Outcome(**{name: value for name, value in event.items() if name != "carry"})
        status, submission = JobStatus(outcome.status), Submission(**carry["submission"])
        if outcome.mlflow_run_id:
            self._push_mlflow_link(context, outcome.mlflow_run_id, outcome.mlflow_experiment_id)
        log = self._submission_log(context)
        if status is JobStatus.STOPPED and carry["reattached"]:
            # The stop belonged to the attempt before (cleared or killed), and this attempt attached too early.
            log.consume(submission)
            self.log.info("The job was stopped together with an earlier attempt; starting a new one.")
            return self._execute_in_time(context)
        taken_in: int | None = None
        try:
            with as_stage_failures(max_retries):
                known = {"run": run, "store": self._open_store(), "outcome": outcome, "max_retries": max_retries}
                if status is JobStatus.SUCCEEDED:
                    returned = self._finish(context, run, read_result(Stage(self.stage), **known))
                    taken_in = _clear_number(context)
                    return returned
                if status is JobStatus.STOPPED and self._terminated:
                    raise _preempted(max_retries)
                raise explain_failure(Stage(self.stage), **known)
        except StageOutOfMemory as error:
            log.count_out_of_memory()
            if carry["micro_batch_size"] == 1:
                raise StageOutOfMemoryForGood(
                    error.message,
                    advice=f"execution.{self.stage}.micro_batch_size is 1 already. Set gradient_checkpointing, use "
                    "engine=fsdp with more workers, GPUs with more memory, or a shorter tokenize.sequence_length.",
                ) from None
            raise
        finally:
            if status is not JobStatus.UNREACHABLE:
                # Only now is the outcome processed; a job that may still run keeps its record for the retry.
                log.consume(submission, taken_in=taken_in)
            if status not in (JobStatus.UNREACHABLE, JobStatus.SUCCEEDED):
                from operators.mlflow import end_stage_runs

                end_stage_runs(run, self.stage, killed=status is JobStatus.STOPPED)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Stop the job when its time is over: neither Airflow's on_kill nor the trigger's runs then."""
        from operators.metrics import failures_counted

        with failures_counted(self.stage, ti=context["ti"]):
            try:
                return super().resume_execution(next_method, next_kwargs, context)
            except TaskDeferralTimeout:
                raise self._timed_out(context, self.timeout) from None

    def _timed_out(self, context: Any, limit: timedelta | None) -> StageTimedOut:
        from operators.prepare import load_config
        from operators.ray.submission import patiently

        # What the trigger carried is not given back after a timeout.
        with as_stage_failures():
            config = load_config(self._open_store(), self._run(context))
        max_retries = config.stage_execution(Stage(self.stage)).max_retries
        what = f"{self.stage} ran longer than its timeout of {limit}"
        if not self.cancel_on_kill:
            return StageTimedOut(
                f"{what}; cancel_on_kill=False lets its job go on.",
                advice="The retry attaches to the job; raise the task's timeout if it needs longer.",
                max_retries=max_retries,
            )
        log = self._submission_log(context)
        submission = log.last()
        if submission is not None and not submission.consumed:
            with as_stage_failures(max_retries), RayJobHook(self.ray_conn_id) as hook:
                patiently(lambda: hook.stop_job(submission.submission_id), self.unreachable_seconds)
            log.consume(submission)
        return StageTimedOut(
            f"{what}; its Ray job was stopped.",
            advice="The retry resumes from the last checkpoint; raise the task's timeout if it needs longer.",
            max_retries=max_retries,
        )

    def on_kill(self) -> None:
        """SIGTERM while this process, not the triggerer, is in charge of the job.

        Airflow sends it when the task was cleared or marked, and then the job must end; and also when a worker shuts
        down or a new scheduler took the task over, and then the job goes on, for the next attempt to attach to. Only
        Airflow's record of the task tells which; it can be asked while this process does nothing but wait.
        """
        submission_id, self._terminated = self._running, True
        if submission_id is None:
            return
        if self._waiting_as is not None and self._goes_on(self._waiting_as):
            raise _preempted()
        if not self.cancel_on_kill:
            return
        from operators.ray.submission import patiently

        with RayJobHook(self.ray_conn_id) as hook:
            patiently(lambda: hook.stop_job(submission_id), _KILL_PATIENCE_SECONDS)
        self.log.info("Stopped Ray job %s.", submission_id)

    def _goes_on(self, ti: Any) -> bool:
        """Whether Airflow still has a use for the job of this task instance."""
        name = ti.task_id if ti.map_index in (None, -1) else f"{ti.task_id}_{ti.map_index}"
        try:
            tasks = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id]).get(ti.run_id, {})
        except Exception as error:  # noqa: BLE001 - whatever is wrong with Airflow, nobody has asked for a stop
            self.log.warning("Airflow does not tell what became of the task: %s: %s", type(error).__name__, error)
            return True
        self.log.info("Asked to end while the task is %s.", tasks.get(name, "gone"))
        return name in tasks and tasks[name] in _GOES_ON

    def _run(self, context: Any) -> RunInfo:
        value = context["ti"].xcom_pull(task_ids=self.resolve_task_id)
        if value is None:
            raise StageConfigFailed(
                f"Task {self.resolve_task_id!r} left no run information for stage {self.stage!r}.",
                advice=f"Clear {self.resolve_task_id!r}, or put a task of that name that calls operators.run.start_run "
                "before the stages.",
            )
        return RunInfo.model_validate(value)

    def _open_store(self) -> "Store":
        from stages.artifacts.addresses import open_default_store

        return open_default_store(self.store_uri)

    def _skip_unless_selected(self, config: "PipelineConfig") -> None:
        from operators.prepare import selection

        if Stage(self.stage) not in selection(config):
            raise AirflowSkipException(
                f"{self.stage} is not part of this run (alignment={config.alignment}, "
                f"last_stage={config.last_stage}, base_model={config.base_model!r})"
            )

    def _request(self, context: Any, *, run: RunInfo, store: "Store") -> StageRequest:
        from operators.prepare import build_request, input_stages, load_config, with_approval

        config = load_config(store, run)
        self._skip_unless_selected(config)
        ti, stage = context["ti"], Stage(self.stage)
        sources = set(input_stages(stage, config).values())
        upstream = {source: ti.xcom_pull(task_ids=source.value) for source in sources}
        request = build_request(stage, run=_of_mapped(run, ti.map_index), store=store, config=config, upstream=upstream)
        if stage is Stage.PROMOTE:
            request = with_approval(request, config, ti.xcom_pull(task_ids=self.approve_task_id))
        execution = self._within_memory(context, request.execution)
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number, "execution": execution})

    def _within_memory(self, context: Any, execution: "ExecutionConfig") -> "ExecutionConfig":
        """Halve the micro-batch once for each time the task ran out of memory; the global batch stays as it is."""
        failures = self._submission_log(context).out_of_memory_failures()
        configured = execution.micro_batch_size
        effective = max(1, configured // 2**failures)
        if effective == configured:
            return execution
        self.log.info(
            "Out of memory %d times so far: execution.%s.micro_batch_size is %d instead of %d; results do not change.",
            failures,
            self.stage,
            effective,
            configured,
        )
        return execution.model_copy(update={"micro_batch_size": effective})

    def _submission_log(self, context: Any) -> "SubmissionLog":
        from airflow.sdk.execution_time.context import NEVER_EXPIRE

        from operators.ray.submission import SubmissionLog, TaskKey

        ti = context["ti"]
        map_index = -1 if ti.map_index is None else ti.map_index
        key = TaskKey(ti.dag_id, ti.run_id, ti.task_id, map_index)
        return SubmissionLog(context["task_state_store"], key, retention=NEVER_EXPIRE)

    def _attach_or_submit(self, context: Any, hook: RayJobHook, store: "Store", request: StageRequest) -> "Attached":
        from operators.ray.ownership import GENERATION
        from operators.ray.submission import attach_or_submit
        from stages.artifacts.addresses import run_key
        from stages.artifacts.store import write_json

        def key(name: str) -> str:
            return run_key(request.run.run_id, request.stage, name)

        def prepare(submission: "Submission") -> None:
            complete = request.model_copy(update={"submission_id": submission.submission_id})
            for stale in ("result.json", "failure.json"):
                store.delete(key(stale))
            write_json(store, key("config.json"), complete.model_dump(mode="json"))

        metadata = self._metadata(context, request)

        def post(submission: "Submission") -> None:
            self._running = submission.submission_id  # from here on on_kill has something to stop
            hook.submit_job(
                submission_id=submission.submission_id,
                entrypoint=self._command(f"{store.root_uri}/{key('config.json')}"),
                metadata={**metadata, GENERATION: str(submission.generation)},
                num_cpus=request.execution.entrypoint_cpus,
            )
            self.log.info("Submitted Ray job %s.", submission.submission_id)

        return attach_or_submit(
            self._submission_log(context),
            hook,
            try_number=request.try_number,
            clear_number=_clear_number(context),
            prepare=prepare,
            post=post,
            patience_seconds=self.unreachable_seconds,
        )

    def _metadata(self, context: Any, request: StageRequest) -> dict[str, str]:
        """What Ray's dashboard shows about the job, and by which the reaper knows it; nothing secret."""
        from operators.ray.ownership import airflow_id, job_metadata

        ti = context["ti"]
        return {
            "athanor.stage": request.stage.value,
            "athanor.run_id": request.run.run_id,
            **job_metadata(
                airflow_id(),
                dag_id=ti.dag_id,
                run_id=ti.run_id,
                task_id=ti.task_id,
                map_index=-1 if ti.map_index is None else ti.map_index,
                try_number=ti.try_number,
                cancel_on_kill=self.cancel_on_kill,
            ),
        }

    def _command(self, config_uri: str) -> str:
        settings = " ".join(f"{name}={value}" for name, value in _JOB_ENVIRONMENT.items())
        return f"env {settings} {self.entrypoint.format(config_uri=shlex.quote(config_uri))}"

    def _defer(self, request: StageRequest, carry: dict[str, Any]) -> None:
        from operators.ray.trigger import RayJobTrigger
        from stages.artifacts.addresses import run_key

        trigger = RayJobTrigger(
            ray_conn_id=self.ray_conn_id,
            submission_id=carry["submission"]["submission_id"],
            settings=asdict(self._watch_settings(request)),
            cancel_on_kill=self.cancel_on_kill,
            store_uri=request.store_uri,
            cursor_key=run_key(request.run.run_id, request.stage, "log.json"),
            carry=carry,
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=self.timeout)

    def _watch_settings(self, request: StageRequest) -> "WatchSettings":
        from operators.ray.watch import WatchSettings

        execution = request.execution
        return WatchSettings(
            poll_interval=self.poll_interval,
            unreachable_seconds=self.unreachable_seconds,
            progress_seconds=self.progress_seconds,
            stall_seconds=execution.stall_seconds and execution.stall_seconds + _STALL_MARGIN_SECONDS,
            capacity_seconds=execution.capacity_seconds,
            asked_cpus=execution.entrypoint_cpus,
        )

    def _time_limit(self) -> timedelta | None:
        """How long this process may watch a job; in the triggerer, `timeout` alone counts."""
        return min((limit for limit in (self.timeout, self.execution_timeout) if limit), default=None)

    def _wait(self, context: Any, submission_id: str, request: StageRequest) -> "Outcome":
        """Watch in this process, the way the trigger would; raises AirflowTaskTimeout when its time is over."""
        from operators.ray.client import RayJobClient
        from operators.ray.watch import LogCursor, watch_job
        from stages.artifacts.addresses import run_key

        settings = self._watch_settings(request)
        endpoint = RayJobHook(self.ray_conn_id).endpoint
        cursor = LogCursor(request.store_uri, run_key(request.run.run_id, request.stage, "log.json"), submission_id)

        limit = self._time_limit()

        async def watch() -> "Outcome":
            async with asyncio.timeout(limit.total_seconds() if limit else None), RayJobClient(endpoint) as client:
                return await watch_job(client, submission_id, cursor=cursor, logger=self.log, settings=settings)

        self._waiting_as = context["ti"]
        try:
            return asyncio.run(watch())
        except TimeoutError:
            raise AirflowTaskTimeout from None
        finally:
            self._waiting_as = None

    def _finish(self, context: Any, run: RunInfo, result: StageResult) -> dict[str, Any]:
        from operators.metrics import count_finished

        artifact = result.artifact
        self._push_link(context, ArtifactLink(), artifact.uri)
        if artifact.mlflow_run_id and MlflowRunLink().xcom_key not in self.link_addresses:
            self._push_mlflow_link(context, artifact.mlflow_run_id, None)
        if self.stage == Stage.REPORT and artifact.mlflow_run_id:
            from operators.mlflow import parent_artifact_page

            if page := parent_artifact_page(artifact.mlflow_run_id, "report.html"):
                self._push_link(context, ReportLink(), page)
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra = {
                    **artifact.model_dump(mode="json", exclude_none=True),
                    "run_id": run.run_id,
                    "hit": result.hit,
                }
        if result.hit:
            self.log.info("%s: nothing to do, the artifact exists: %s", self.stage, artifact.uri)
        else:
            self.log.info("%s built in %.1f s: %s", self.stage, result.wall_seconds, artifact.uri)
        count_finished(result, ti=context["ti"])
        return artifact.model_dump(mode="json")

    def _push_link(self, context: Any, link: Any, address: str) -> None:
        self.link_addresses[link.xcom_key] = address
        context["ti"].xcom_push(key=link.xcom_key, value=address)

    def _push_mlflow_link(self, context: Any, run_id: str, experiment_id: str | None) -> None:
        if tracking_uri := os.environ.get("MLFLOW_TRACKING_URI"):
            self._push_link(context, MlflowRunLink(), mlflow_run_page(tracking_uri, run_id, experiment_id))


def _preempted(max_retries: int | None = None) -> StagePreempted:
    return StagePreempted(
        "Airflow ended this process while it waited for the job.",
        advice="The next attempt attaches to the job, or starts it anew from its checkpoint if it was stopped.",
        max_retries=max_retries,
    )


def _clear_number(context: Any) -> int:
    """How often somebody cleared tasks of this run; retries and restarts do not count."""
    return context["dag_run"].clear_number or 0


def _of_mapped(run: RunInfo, map_index: int | None) -> RunInfo:
    """Give each instance of a mapped task a folder of its own under `runs/`."""
    if map_index is None or map_index < 0:
        return run
    return run.model_copy(update={"run_id": f"{run.run_id}.{map_index}"})


def _outcome_of(attached: "Attached") -> "Outcome":
    """The outcome of a job whose outcome, and log, was processed before."""
    from operators.ray.watch import Outcome

    job = attached.job
    if job is None:
        raise AssertionError("a job that has ended is known")
    return Outcome(job.submission_id, job.status.value, job.message, job.error_type, job.exit_code)
