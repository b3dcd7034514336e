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
from airflow.sdk.exceptions import AirflowSkipException, TaskDeferralTimeout

from operators.failures import StageConfigFailed, StageTimedOut, as_stage_failures
from operators.hook import DEFAULT_CONN_ID, RayJobHook
from operators.jobs import JobStatus
from operators.links import ArtifactLink, MlflowRunLink, RayJobLink, ReportLink, mlflow_run_page
from stages.config.graph import GRAPH, Stage
from stages.config.request import RunInfo, StageRequest, StageResult

if TYPE_CHECKING:
    from operators.submission import Attached, Submission, SubmissionLog
    from operators.watch import Outcome
    from stages.config.pipeline import PipelineConfig
    from stages.store import Store

ENTRYPOINT = "python -m stages {config_uri}"

# Set in front of the entrypoint rather than in a runtime environment: jobs that have one cannot use Ray's warm workers.
_JOB_ENVIRONMENT = {"RAY_COLOR_PREFIX": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


class StageOperator(BaseOperator):
    """Run one stage and return its ArtifactRef as JSON.

    The task `resolve_task_id` returned the RunInfo; inputs come from the tasks named like the stages that GRAPH says.
    `timeout` bounds the job's time and stops the job; Airflow's own `execution_timeout` does not count deferred time.
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

    def execute(self, context: Any) -> dict[str, Any]:
        from operators.mlflow import note_hit
        from operators.prepare import find_hit

        with as_stage_failures():
            run, store = self._run(context), self._open_store()
            request = self._request(context, run=run, store=store)
            max_retries = request.execution.max_retries
        with as_stage_failures(max_retries):
            if hit := find_hit(store, request):
                note_hit(run, self.stage, hit.artifact)
                return self._finish(context, run, hit)
            with RayJobHook(self.ray_conn_id) as hook:
                attached = self._attach_or_submit(context, hook, store, request)
                self._running = attached.submission.submission_id
                self._push_link(context, RayJobLink(), hook.endpoint.job_page(self._running))
        carry = {
            "run": run.model_dump(mode="json"),
            "submission": asdict(attached.submission),
            "reattached": attached.reattached,
            "max_retries": max_retries,
            "links": self.link_addresses,
        }
        if attached.job is not None and not attached.job.status.is_active:
            # Ended before anybody watched: processed here and now, a failure included.
            return self.execute_complete(context, {**_outcome_of(attached).to_json(), "carry": carry})
        if self.deferrable:
            self._defer(request, carry)
        with as_stage_failures(max_retries):
            outcome = self._wait(attached.submission.submission_id)
        return self.execute_complete(context, {**outcome.to_json(), "carry": carry})

    def execute_complete(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:
        """Turn the end of the job into the end of the task."""
        from operators.results import explain_failure, read_result
        from operators.submission import Submission
        from operators.watch import Outcome

        carry = event["carry"]
        self.link_addresses = dict(carry["links"])
        run, max_retries = RunInfo.model_validate(carry["run"]), carry["max_retries"]
        outcome = Outcome(**{name: value for name, value in event.items() if name != "carry"})
        status, submission = JobStatus(outcome.status), Submission(**carry["submission"])
        if outcome.mlflow_run_id:
            self._push_mlflow_link(context, outcome.mlflow_run_id, outcome.mlflow_experiment_id)
        if status is not JobStatus.UNREACHABLE:
            # From here on the outcome counts as processed; a job that may still run keeps its record for the retry.
            self._submission_log(context).consume(submission)
        if status is JobStatus.STOPPED and carry["reattached"]:
            # The stop belonged to the attempt before (cleared or killed), and this attempt attached too early.
            self.log.info("The job was stopped together with an earlier attempt; starting a new one.")
            return self.execute(context)
        with as_stage_failures(max_retries):
            known = {"run": run, "store": self._open_store(), "outcome": outcome, "max_retries": max_retries}
            if status is JobStatus.SUCCEEDED:
                return self._finish(context, run, read_result(Stage(self.stage), **known))
            raise explain_failure(Stage(self.stage), **known)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Stop the job when its time is over: neither Airflow's on_kill nor the trigger's runs then."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            log = self._submission_log(context)
            submission = log.last()
            if submission is not None and not submission.consumed:
                with as_stage_failures(), RayJobHook(self.ray_conn_id) as hook:
                    hook.stop_job(submission.submission_id)
                log.consume(submission)
            raise StageTimedOut(
                f"{self.stage} ran longer than its timeout of {self.timeout}; its Ray job was stopped.",
                advice="The retry resumes from the last checkpoint; raise the task's timeout if it needs longer.",
            ) from None

    def on_kill(self) -> None:
        """SIGTERM or execution_timeout while this process, not the triggerer, is in charge of the job."""
        if self._running is None or not self.cancel_on_kill:
            return
        with RayJobHook(self.ray_conn_id) as hook:
            hook.stop_job(self._running)
        self.log.info("Stopped Ray job %s.", self._running)

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
        from stages.store import open_store

        return open_store(self.store_uri or os.environ.get("ARTIFACT_STORE", ""))

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
        request = build_request(stage, run=run, store=store, config=config, upstream=upstream)
        if stage is Stage.PROMOTE:
            request = with_approval(request, config, ti.xcom_pull(task_ids=self.approve_task_id))
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number})

    def _submission_log(self, context: Any) -> "SubmissionLog":
        from airflow.sdk.execution_time.context import NEVER_EXPIRE

        from operators.submission import SubmissionLog, TaskKey

        ti = context["ti"]
        map_index = -1 if ti.map_index is None else ti.map_index
        key = TaskKey(ti.dag_id, ti.run_id, ti.task_id, map_index)
        return SubmissionLog(context["task_state_store"], key, retention=NEVER_EXPIRE)

    def _attach_or_submit(self, context: Any, hook: RayJobHook, store: "Store", request: StageRequest) -> "Attached":
        from operators.submission import attach_or_submit
        from stages.artifacts import run_key
        from stages.store import write_json

        def key(name: str) -> str:
            return run_key(request.run.run_id, request.stage, name)

        def prepare(submission: "Submission") -> None:
            complete = request.model_copy(update={"submission_id": submission.submission_id})
            for stale in ("result.json", "failure.json"):
                store.delete(key(stale))
            write_json(store, key("config.json"), complete.model_dump(mode="json"))

        def post(submission: "Submission") -> None:
            hook.submit_job(
                submission_id=submission.submission_id,
                entrypoint=self._command(f"{store.root_uri}/{key('config.json')}"),
                metadata=_metadata(request),
                num_cpus=request.execution.entrypoint_cpus,
            )
            self.log.info("Submitted Ray job %s.", submission.submission_id)

        return attach_or_submit(
            self._submission_log(context),
            hook,
            try_number=request.try_number,
            prepare=prepare,
            post=post,
            patience_seconds=self.unreachable_seconds,
        )

    def _command(self, config_uri: str) -> str:
        settings = " ".join(f"{name}={value}" for name, value in _JOB_ENVIRONMENT.items())
        return f"env {settings} {self.entrypoint.format(config_uri=shlex.quote(config_uri))}"

    def _defer(self, request: StageRequest, carry: dict[str, Any]) -> None:
        from operators.trigger import RayJobTrigger
        from stages.artifacts import run_key

        trigger = RayJobTrigger(
            ray_conn_id=self.ray_conn_id,
            submission_id=carry["submission"]["submission_id"],
            poll_interval=self.poll_interval,
            unreachable_seconds=self.unreachable_seconds,
            progress_seconds=self.progress_seconds,
            cancel_on_kill=self.cancel_on_kill,
            store_uri=request.store_uri,
            cursor_key=run_key(request.run.run_id, request.stage, "log.json"),
            carry=carry,
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=self.timeout)

    def _wait(self, submission_id: str) -> "Outcome":
        """Watch in this process, the way the trigger would."""
        from operators.client import RayJobClient
        from operators.watch import JobWatcher, WatchSettings

        settings = WatchSettings(self.poll_interval, self.unreachable_seconds, self.progress_seconds)
        endpoint = RayJobHook(self.ray_conn_id).endpoint

        async def watch() -> "Outcome":
            async with RayJobClient(endpoint) as client:
                return await JobWatcher(client, submission_id, logger=self.log, settings=settings).watch()

        return asyncio.run(watch())

    def _finish(self, context: Any, run: RunInfo, result: StageResult) -> dict[str, Any]:
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
        return artifact.model_dump(mode="json")

    def _push_link(self, context: Any, link: Any, address: str) -> None:
        self.link_addresses[link.xcom_key] = address
        context["ti"].xcom_push(key=link.xcom_key, value=address)

    def _push_mlflow_link(self, context: Any, run_id: str, experiment_id: str | None) -> None:
        if tracking_uri := os.environ.get("MLFLOW_TRACKING_URI"):
            self._push_link(context, MlflowRunLink(), mlflow_run_page(tracking_uri, run_id, experiment_id))


def _metadata(request: StageRequest) -> dict[str, str]:
    """What Ray's dashboard shows about the job; names only, nothing secret."""
    return {
        "athanor.stage": request.stage.value,
        "athanor.run_id": request.run.run_id,
        "airflow.dag_id": request.run.dag_id,
        "airflow.run_id": request.run.airflow_run_id,
        "airflow.task_id": request.task_id,
        "airflow.try_number": str(request.try_number),
    }


def _outcome_of(attached: "Attached") -> "Outcome":
    """The outcome of a job that had ended when the task found it."""
    from operators.watch import Outcome

    job = attached.job
    if job is None:
        raise AssertionError("a job that has ended is known")
    return Outcome(job.submission_id, job.status.value, job.message, job.error_type, job.exit_code)
