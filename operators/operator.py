"""One pipeline stage as an Airflow task: find its artifact, else run it as a Ray job and wait without a worker slot.

When a DAG is read, a StageOperator is a name and a few settings; everything else is imported and happens in `execute`.
One JSON document in the object store goes to Ray, and another one comes back.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, AirflowTaskTimeout, TaskDeferralTimeout

from operators.failures import (
    StageConfigFailed,
    StageFailed,
    StageOutOfMemory,
    StageTimedOut,
    as_stage_failures,
    ended_while_waiting,
    out_of_memory_for_good,
)
from operators.links import ArtifactLink, MlflowRunLink, RayJobLink, ReportLink, mlflow_run_page
from operators.ray.hook import DEFAULT_CONN_ID, RayJobHook
from operators.ray.jobs import JobStatus
from stages.config.graph import GRAPH, Stage
from stages.config.mlflow import tracking_server
from stages.config.request import RunInfo, StageRequest, StageResult
from stages.config.review import REVIEW_TASK

if TYPE_CHECKING:
    from operators.dispatch import Carried
    from operators.ray.watch import Outcome, WatchSettings
    from stages.artifacts.store import Store

ENTRYPOINT = "python -m stages {config_uri}"

_KILL_PATIENCE_SECONDS = 20.0
_STILL_WANTED = frozenset({None, "scheduled", "queued", "running", "deferred", "up_for_retry"})
"""States of a task that Airflow runs now or will run again by itself, so its job is still of use when the process gets
SIGTERM. A cleared task is `restarting`; one that was marked by a user has ended."""


class StageOperator(BaseOperator):
    """Run one stage and return its ArtifactRef as JSON.

    The task `resolve_task_id` returned the RunInfo; inputs come from the tasks named after the stages in GRAPH. A stage
    whose config has an `approval` gets the answer of the task `approve_task_id`, one whose config has a `champion` gets
    the present champion as an input, and one that reads data which a person reviews needs the approval of the task
    `review_task_id`.
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
        review_task_id: str = REVIEW_TASK,
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
        self.stage = self.counted_as = spec.stage.value
        self.ray_conn_id = ray_conn_id
        self.resolve_task_id = resolve_task_id
        self.approve_task_id = approve_task_id
        self.review_task_id = review_task_id
        self.store_uri = store_uri
        self.entrypoint = entrypoint
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.unreachable_seconds = unreachable_seconds
        self.progress_seconds = progress_seconds
        self.timeout = timeout
        self.cancel_on_kill = cancel_on_kill
        page_link = (ReportLink(),) if spec.page else ()
        self.operator_extra_links = (RayJobLink(), MlflowRunLink(), ArtifactLink(), *page_link)
        self.link_addresses: dict[str, str] = {}
        self._running: str | None = None
        self._waiting_as: Any = None
        self._terminated = False

    def execute(self, context: Any) -> dict[str, Any]:
        from operators.metrics import failures_counted

        with failures_counted(self.counted_as, ti=context["ti"]):
            return self._execute_in_time(context)

    def _execute_in_time(self, context: Any) -> dict[str, Any]:
        try:
            return self._execute(context)
        except AirflowTaskTimeout:
            raise self._timed_out(context, self._time_limit()) from None

    def _execute(self, context: Any) -> dict[str, Any]:
        from operators.dispatch import Carried, attach, outcome_of

        with as_stage_failures():
            run, store = self._run(context), self._open_store()
            request = self._request(context, run=run, store=store)
            run, max_retries = request.run, request.execution.max_retries
        with as_stage_failures(max_retries):
            if (found := self._without_job(context, store, request)) is not None:
                return found
            with RayJobHook(self.ray_conn_id) as hook:
                attached = attach(
                    context,
                    hook,
                    store,
                    request,
                    entrypoint=self.entrypoint,
                    cancel_on_kill=self.cancel_on_kill,
                    patience_seconds=self.unreachable_seconds,
                    on_submit=self._watch_over,
                )
                submission_id = attached.submission.submission_id
                self._watch_over(submission_id)
                self._push_link(context, RayJobLink(), hook.endpoint.job_page(submission_id))
        carried = Carried(
            run=run,
            submission=attached.submission,
            reattached=attached.reattached,
            max_retries=max_retries,
            micro_batch_size=request.execution.micro_batch_size,
            links=dict(self.link_addresses),
        )
        if self._terminated:
            raise ended_while_waiting(max_retries)
        if attached.submission.consumed:
            return self._complete(context, outcome_of(attached), carried)
        # A job that ended before any process watched it is processed here and now, whether it failed or not.
        ended = attached.job is not None and not attached.job.status.is_active
        if self.deferrable and not ended:
            self._defer(request, carried)
        with as_stage_failures(max_retries):
            outcome = self._wait(context, submission_id, request)
        return self._complete(context, outcome, carried)

    def execute_complete(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:
        """Resume after the deferral: the trigger's event has the outcome, and what the trigger carried."""
        from operators.dispatch import Carried
        from operators.ray.watch import Outcome

        outcome = Outcome(**{name: value for name, value in event.items() if name != "carry"})
        return self._complete(context, outcome, Carried.from_json(event["carry"]))

    def _complete(self, context: Any, outcome: "Outcome", carried: "Carried") -> dict[str, Any]:
        """Turn the end of the job into the end of the task."""
        from operators.dispatch import clear_number, submission_log

        self.link_addresses = dict(carried.links)
        run, max_retries, status = carried.run, carried.max_retries, JobStatus(outcome.status)
        if outcome.mlflow_run_id:
            self._push_mlflow_link(context, outcome.mlflow_run_id, outcome.mlflow_experiment_id)
        log = submission_log(context)
        if status is JobStatus.STOPPED and carried.reattached:
            # The attempt before was cleared or killed, and the stop was meant for it; this one attached too early.
            log.consume(carried.submission)
            self.log.info("The job was stopped together with an earlier attempt; starting a new one.")
            return self._execute_in_time(context)
        taken_in: int | None = None
        try:
            with as_stage_failures(max_retries):
                known = {"run": run, "store": self._open_store(), "outcome": outcome, "max_retries": max_retries}
                if status is JobStatus.SUCCEEDED:
                    returned = self._taken(context, **known)
                    taken_in = clear_number(context)
                    return returned
                if status is JobStatus.STOPPED and self._terminated:
                    raise ended_while_waiting(max_retries)
                if (settled := self._settled(context, **known)) is not None:
                    return settled
                raise self._explained(**known)
        except StageOutOfMemory as error:
            log.count_out_of_memory()
            if carried.micro_batch_size == 1:
                raise out_of_memory_for_good(error, self.stage) from None
            raise
        finally:
            if status is not JobStatus.UNREACHABLE:
                # Only now is the outcome processed; a job that may still run keeps its record for the retry.
                log.consume(carried.submission, taken_in=taken_in)
            if status not in (JobStatus.UNREACHABLE, JobStatus.SUCCEEDED):
                self._end_runs(run, killed=status is JobStatus.STOPPED)

    # What a task of another kind of job has another answer to: see operators/gates.py.

    def _without_job(self, context: Any, store: "Store", request: StageRequest) -> dict[str, Any] | None:
        """Return what the task returns where the artifact exists already; None when a job must make it."""
        from operators.mlflow import note_artifact
        from operators.prepare import find_hit

        if (hit := find_hit(store, request)) is None:
            return None
        note_artifact(request.run, self.stage, hit.artifact, hit=True)
        return self._finish(context, request.run, hit)

    def _taken(self, context: Any, *, run: RunInfo, **known: Any) -> dict[str, Any]:
        """Return what the task returns after a job that succeeded."""
        from operators.results import read_result

        return self._finish(context, run, read_result(Stage(self.stage), run=run, **known))

    def _settled(self, context: Any, **known: Any) -> dict[str, Any] | None:
        """Return what the task returns although its job failed; None where it fails with it."""
        return None

    def _made_by(self, ti: Any, source: Stage) -> Any:
        """Return what the task of an input stage returned."""
        return ti.xcom_pull(task_ids=source.value)

    def _run_of_instance(self, ti: Any, run: RunInfo) -> RunInfo:
        """The run as the stage of this task instance knows it, with a folder of its own."""
        from operators.dispatch import of_mapped

        return of_mapped(run, ti.map_index)

    def _explained(self, **known: Any) -> StageFailed:
        from operators.results import explain_failure

        return explain_failure(Stage(self.stage), **known)

    def _end_runs(self, run: RunInfo, *, killed: bool) -> None:
        from operators.mlflow import end_stage_runs

        end_stage_runs(run, self.stage, killed=killed)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Stop the job when its time is over; Airflow then calls neither this operator's on_kill nor the trigger's."""
        from operators.metrics import failures_counted

        with failures_counted(self.counted_as, ti=context["ti"]):
            try:
                return super().resume_execution(next_method, next_kwargs, context)
            except TaskDeferralTimeout:
                raise self._timed_out(context, self.timeout) from None

    def _timed_out(self, context: Any, limit: timedelta | None) -> StageTimedOut:
        from operators.dispatch import submission_log
        from operators.prepare import load_config
        from operators.ray.submission import patiently

        # After a timeout Airflow does not give back what the trigger carried.
        with as_stage_failures():
            config = load_config(self._open_store(), self._run(context))
        max_retries = config.stage_execution(Stage(self.stage)).max_retries
        what = f"{self.stage} ran longer than its timeout of {limit}"
        if not self.cancel_on_kill:
            return StageTimedOut(
                f"{what}; its job continues because of cancel_on_kill=False.",
                advice="The retry attaches to the job; raise the task's timeout if it needs longer.",
                max_retries=max_retries,
            )
        log = submission_log(context)
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

        Airflow sends it when the task was cleared or marked; then the job must end. It also sends it when a worker
        shuts down or a new scheduler adopted the task; then the job continues, and the next attempt attaches to it.
        Only Airflow's record of the task tells the two apart, and it can be asked only while this process just waits.
        """
        submission_id, self._terminated = self._running, True
        if submission_id is None:
            return
        if self._waiting_as is not None and self._is_still_wanted(self._waiting_as):
            raise ended_while_waiting()
        if not self.cancel_on_kill:
            return
        from operators.ray.submission import patiently

        with RayJobHook(self.ray_conn_id) as hook:
            patiently(lambda: hook.stop_job(submission_id), _KILL_PATIENCE_SECONDS)
        self.log.info("Stopped Ray job %s.", submission_id)

    def _is_still_wanted(self, ti: Any) -> bool:
        """Whether Airflow still has a use for the job of this task instance."""
        name = ti.task_id if ti.map_index in (None, -1) else f"{ti.task_id}_{ti.map_index}"
        try:
            tasks = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id]).get(ti.run_id, {})
        except Exception as error:  # noqa: BLE001 - whatever is wrong with Airflow, it is no request to stop
            self.log.warning("Airflow does not tell the state of the task: %s: %s", type(error).__name__, error)
            return True
        self.log.info("Asked to end while the task is %s.", tasks.get(name, "gone"))
        return name in tasks and tasks[name] in _STILL_WANTED

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

    def _request(self, context: Any, *, run: RunInfo, store: "Store") -> StageRequest:
        from operators.champion import with_champion
        from operators.dispatch import submission_log, within_memory
        from operators.prepare import (
            build_request,
            input_stages,
            load_config,
            require_review,
            reviewed_inputs,
            selection,
            with_approval,
        )

        config = load_config(store, run)
        ti, stage = context["ti"], Stage(self.stage)
        if stage not in selection(config):
            why = "dry run" if config.dry_run else config.skipped.get(stage, "it runs other stages alone")
            raise AirflowSkipException(f"{stage.value} is not part of this run: {why}")
        upstream = {source: self._made_by(ti, source) for source in set(input_stages(stage, config).values())}
        request = build_request(
            stage, run=self._run_of_instance(ti, run), store=store, config=config, upstream=upstream
        )
        if "approval" in request.config:
            request = with_approval(request, config, ti.xcom_pull(task_ids=self.approve_task_id))
        if reviewed_inputs(stage, config):
            require_review(request, config, ti.xcom_pull(task_ids=self.review_task_id))
        if "champion" in request.config:
            request = with_champion(request, config)
        execution = within_memory(request.execution, stage=stage, log=submission_log(context))
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number, "execution": execution})

    def _defer(self, request: StageRequest, carried: "Carried") -> None:
        from operators.dispatch import cursor_key
        from operators.trigger import RayJobTrigger

        trigger = RayJobTrigger(
            ray_conn_id=self.ray_conn_id,
            submission_id=carried.submission.submission_id,
            settings=asdict(self._watch_settings(request)),
            cancel_on_kill=self.cancel_on_kill,
            store_uri=request.store_uri,
            cursor_key=cursor_key(request),
            carry=carried.to_json(),
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=self.timeout)

    def _watch_settings(self, request: StageRequest) -> "WatchSettings":
        from operators.dispatch import watch_settings

        return watch_settings(
            request,
            poll_interval=self.poll_interval,
            unreachable_seconds=self.unreachable_seconds,
            progress_seconds=self.progress_seconds,
        )

    def _time_limit(self) -> timedelta | None:
        """How long this process may watch a job; in the triggerer only `timeout` counts."""
        return min((limit for limit in (self.timeout, self.execution_timeout) if limit), default=None)

    def _wait(self, context: Any, submission_id: str, request: StageRequest) -> "Outcome":
        """Watch in this process, the way the trigger would; raises AirflowTaskTimeout when its time is over."""
        from operators.dispatch import cursor_key
        from operators.ray.client import RayJobClient
        from operators.ray.watch import LogCursor, watch_job

        settings = self._watch_settings(request)
        endpoint = RayJobHook(self.ray_conn_id).endpoint
        cursor = LogCursor(request.store_uri, cursor_key(request), submission_id)
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
        if (page := GRAPH[Stage(self.stage)].page) and artifact.mlflow_run_id:
            from operators.mlflow import parent_artifact_page

            if address := parent_artifact_page(artifact.mlflow_run_id, page):
                self._push_link(context, ReportLink(), address)
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

    def _watch_over(self, submission_id: str) -> None:
        """From here on on_kill has a job to stop."""
        self._running = submission_id

    def _push_link(self, context: Any, link: Any, address: str) -> None:
        self.link_addresses[link.xcom_key] = address
        context["ti"].xcom_push(key=link.xcom_key, value=address)

    def _push_mlflow_link(self, context: Any, run_id: str, experiment_id: str | None) -> None:
        if tracking_uri := tracking_server():
            self._push_link(context, MlflowRunLink(), mlflow_run_page(tracking_uri, run_id, experiment_id))
