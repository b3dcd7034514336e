"""The task after a stage that decides whether the run goes on: `gate_<stage>`.

What is recorded is checked in the task itself, in milliseconds. What only the model can answer is asked in a short Ray
job, which is submitted, attached to again and stopped as the job of a stage is. What the job found is kept by the
artifact's content, so a repeated run starts none. A gate that fails is red, keeps its evidence in `gate.json`, and
stops what comes after it, unless the run's form lets it pass for a reason.
"""

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from operators.failures import GateFailed, StageFailed, StageInfrastructureFailed
from operators.links import RayJobLink
from operators.operator import StageOperator
from operators.ray.jobs import JobStatus
from stages.config.errors import ConfigError, DamagedArtifactError, DataError
from stages.config.gate_records import (
    Check,
    Findings,
    GateOverride,
    GateRecord,
    GateRequest,
    Outcome,
    failed,
    findings_key,
    gate_key,
)
from stages.config.gates import GatesConfig, gate_name, parse_bounds
from stages.config.graph import GOLD_MODEL, GRAPH, Stage
from stages.config.invariants import bound_checks, recorded_checks
from stages.config.records import parse_record
from stages.config.request import ArtifactRef, Failure, RunInfo

if TYPE_CHECKING:
    from operators.ray.watch import Outcome as JobOutcome
    from stages.artifacts.store import Store
    from stages.config.execution import ExecutionConfig
    from stages.config.pipeline import PipelineConfig

logger = logging.getLogger(__name__)

ENTRYPOINT = "python -m stages.gate {config_uri}"
NO_JOB, KEPT = "none", "kept"
_OFF = "gates.recompute is off"
_MEASURED_BY_JOB = "accept/"
_STARTS_ANEW = "The retry examines the artifact again."
_MOST_NAMED = 5


class GateOperator(StageOperator):
    """Decide about what a stage published; return the outcome in a few words.

    Skips itself where its stage is not part of the run.
    """

    ui_color = "#f4d9d0"

    def __init__(self, *, stage: Stage | str, **kwargs: Any) -> None:
        name = gate_name(Stage(stage).value)
        kwargs = {"task_id": name, "entrypoint": ENTRYPOINT, "outlets": [], **kwargs}
        super().__init__(stage=stage, **kwargs)
        self.counted_as = name
        self.operator_extra_links = (RayJobLink(),)

    def _request(self, context: Any, *, run: RunInfo, store: "Store") -> Any:
        from operators.dispatch import submission_log, within_memory
        from operators.prepare import build_request, input_stages, load_config, selection

        config, ti, stage = load_config(store, run), context["ti"], Stage(self.stage)
        if stage not in selection(config):
            why = "dry run" if config.dry_run else config.skipped.get(stage, "it runs other stages alone")
            raise AirflowSkipException(f"{stage.value} is not part of this run: {why}")
        if (published := ti.xcom_pull(task_ids=stage.value)) is None:
            raise ConfigError(
                f"there is nothing to decide about: task {stage.value!r} left no artifact",
                advice=f"Clear {stage.value!r} together with its downstream tasks.",
            )
        upstream = {source: ti.xcom_pull(task_ids=source.value) for source in input_stages(stage, config).values()}
        asked = build_request(stage, run=run, store=store, config=config, upstream=upstream)
        execution = as_a_worker(within_memory(asked.execution, stage=stage, log=submission_log(context)))
        return GateRequest(
            stage=stage,
            run=run,
            store_uri=store.root_uri,
            artifact=ArtifactRef.model_validate(published),
            inputs=asked.inputs,
            gold=_gold(ti, config, stage),
            max_pairs=config.gates.max_pairs,
            max_response_length=config.evaluate.max_response_length,
            execution=execution,
            task_id=ti.task_id,
            try_number=ti.try_number,
        )

    def _without_job(self, context: Any, store: "Store", request: Any) -> dict[str, Any] | None:
        """Decide at once where no job is needed, or where what it would find is kept."""
        gates = self._gates(context, store)
        if not GRAPH[request.stage].trains:
            return self._decide(context, store, request, Findings(), job=NO_JOB)
        if not gates.recompute:
            named = [bound.metric for bound in parse_bounds(gates.bounds_of(request.stage))]
            unmeasured = {metric: _OFF for metric in named if metric.startswith(_MEASURED_BY_JOB)}
            return self._decide(context, store, request, Findings(unmeasured=unmeasured), job=NO_JOB)
        if (kept := _kept(store, request)) is not None:
            return self._decide(context, store, request, kept, job=KEPT)
        return None

    def _taken(self, context: Any, *, run: RunInfo, store: "Store", outcome: "JobOutcome", **known: Any) -> Any:
        # Not with `run`, which travelled without the digests of its records.
        request = self._request(context, run=self._run(context), store=store)
        key = gate_key(run.run_id, request.stage, "result.json")
        try:
            findings = parse_record(Findings, store.read_bytes(key), f"{store.root_uri}/{key}")
        except FileNotFoundError:
            raise StageInfrastructureFailed(
                f"Ray job {outcome.submission_id} succeeded, but {store.root_uri}/{key} does not exist.",
                advice="Check that Airflow and the Ray cluster see the same ARTIFACT_STORE.",
                max_retries=known["max_retries"],
            ) from None
        return self._decide(context, store, request, findings, job=outcome.submission_id)

    def _explained(
        self, *, run: RunInfo, store: "Store", outcome: "JobOutcome", max_retries: int | None
    ) -> StageFailed:
        from operators.failures import job_failure
        from operators.results import explain_failure, told_failure

        stage = Stage(self.stage)
        if outcome.status == JobStatus.FAILED:
            told = told_failure(store, gate_key(run.run_id, stage, "failure.json"), max_retries=max_retries)
            return told or job_failure(outcome.job, stage, max_retries=max_retries)
        found = explain_failure(stage, run=run, store=store, outcome=outcome, max_retries=max_retries)
        return type(found)(found.message, advice=_STARTS_ANEW, max_retries=max_retries)

    def _end_runs(self, run: RunInfo, *, killed: bool) -> None:
        """A gate has no run of its own in MLflow."""

    def _gates(self, context: Any, store: "Store") -> GatesConfig:
        from operators.prepare import load_config

        return load_config(store, self._run(context)).gates

    def _decide(
        self, context: Any, store: "Store", request: GateRequest, findings: Findings, *, job: str
    ) -> dict[str, Any]:
        """Make the checks, keep the outcome with its evidence, and raise GateFailed unless the run may go on."""
        from stages.artifacts.store import write_json

        gates = self._gates(context, store)
        record = judged(request, gates, findings, job=job, by=context["dag_run"].triggering_user_name or "")
        run_id = request.run.run_id
        write_json(store, gate_key(run_id, request.stage), record.model_dump(mode="json"))
        for check in record.checks:
            logger.log(logging.ERROR if check.outcome is Outcome.FAILED else logging.INFO, "%s", _line(check))
        tell_mlflow(request.run, record)
        failure_key = gate_key(run_id, request.stage, "failure.json")
        if not record.lets_pass:
            error = as_failure(record, where=f"{store.root_uri}/{gate_key(run_id, request.stage)}")
            told = Failure(category=error.category, message=error.message, advice=error.advice)
            write_json(store, failure_key, told.model_dump(mode="json"))
            raise error
        store.delete(failure_key)
        if record.override:
            logger.warning("%s", f"{gate_name(record.stage)} failed and is passed over: {record.summary()}")
        return {"outcome": record.outcome.value, "summary": record.summary(), "job": job}


def as_a_worker(execution: "ExecutionConfig") -> "ExecutionConfig":
    """Where the stage's workers have GPUs, the gate's own process reserves what one of them does, to measure there."""
    if not execution.gpus_per_worker:
        return execution
    return execution.model_copy(update={"entrypoint_cpus": max(execution.entrypoint_cpus, execution.cpus_per_worker)})


def _gold(ti: Any, config: "PipelineConfig", stage: Stage) -> ArtifactRef | None:
    """The gold scorer that a reward model is asked about, trained in this run or given to it."""
    from operators.prepare import selection

    if not GRAPH[stage].learnt_from:
        return None
    if (given := config.given.get(GOLD_MODEL)) is not None:
        return given
    trained = next((other for other in selection(config) if GRAPH[other].judges), None)
    published = ti.xcom_pull(task_ids=trained.value) if trained else None
    return ArtifactRef.model_validate(published) if published else None


def judged(request: GateRequest, gates: GatesConfig, findings: Findings, *, job: str, by: str) -> GateRecord:
    """Put everything together that is known of an artifact, and say whether the run may go on."""
    from stages.artifacts.evidence import read_evidence

    bounds = gates.bounds_of(request.stage)
    metrics: dict[str, float] = {}
    checks: list[Check] = []
    try:
        evidence = read_evidence(request.artifact)
    except (DamagedArtifactError, DataError, FileNotFoundError) as error:
        told = str(error) or "it is gone"
        checks.append(
            failed("manifest", told, "the artifact that the stage published", f"Clear {request.stage.value} again.")
        )
    else:
        metrics = dict(evidence.manifest.metrics)
        checks += recorded_checks(evidence, request.inputs)
    checks += findings.checks
    checks += bound_checks(bounds, {**metrics, **findings.metrics}, findings.unmeasured)
    is_failed = any(check.outcome is Outcome.FAILED for check in checks)
    override = GateOverride(by=by, reason=gates.reason) if is_failed and gates.overrides(request.stage) else None
    return GateRecord(
        stage=request.stage,
        artifact=request.artifact,
        outcome=Outcome.FAILED if is_failed else Outcome.PASSED,
        override=override,
        bounds=bounds,
        checks=tuple(checks),
        metrics=findings.metrics,
        tables=findings.tables,
        job=job,
        seconds=findings.seconds,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def as_failure(record: GateRecord, *, where: str) -> GateFailed:
    """The exception that stops the run, with the numbers on both sides of each failed check."""
    failures = record.failures
    told = "; ".join(f"{check.name}: {check.found}; allowed: {check.allowed}" for check in failures[:_MOST_NAMED])
    more = f"; and {len(failures) - _MOST_NAMED} more" if len(failures) > _MOST_NAMED else ""
    advice = " ".join(dict.fromkeys(check.advice for check in failures[:_MOST_NAMED] if check.advice))
    return GateFailed(
        f"{gate_name(record.stage)}: {len(failures)} of {len(record.checks)} checks failed: {told}{more}.",
        advice=f"{advice} All evidence is in {where}. To go on all the same, trigger the run again with "
        f"override_gates={record.stage.value} and override_reason: what is built is not built again.",
    )


def _line(check: Check) -> str:
    return f"{check.outcome.value:<7} {check.in_words()}"


def _kept(store: "Store", request: GateRequest) -> Findings | None:
    """What a job found about this artifact before; a damaged record counts as none."""
    key = findings_key(request)
    try:
        return parse_record(Findings, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s It is measured again.", error.message)
        return None


def tell_mlflow(run: RunInfo, record: GateRecord) -> None:
    """Put the outcome on the stage's run, as tag and as gate.json, and on the parent run; warns when MLflow is away."""
    from operators.mlflow import MlflowServer, MlflowUnavailableError
    from stages.config import mlflow_limits as limits
    from stages.config.mlflow import tracking_server

    tracking_uri, stage_run = tracking_server(), record.artifact.mlflow_run_id
    if not tracking_uri:
        return
    word = "overridden" if record.override else record.outcome.value
    told = limits.shortened(f"{word}: {record.summary()}", limits.TAG_VALUE)
    try:
        with MlflowServer(tracking_uri) as server:
            if run.parent_run_id is not None:
                server.set_tag(run.parent_run_id, f"athanor.{gate_name(record.stage)}", told)
            if stage_run is not None:
                server.set_tag(stage_run, "athanor.gate", told)
                server.log_text(stage_run, "gate.json", record.model_dump_json(indent=1))
    except MlflowUnavailableError as error:
        logger.warning("MLflow does not have the outcome of %s: %s", gate_name(record.stage), error)
