"""The task after a stage that decides whether the run goes on: `gate_<stage>`.

What is recorded is checked in the task itself, in milliseconds. What only the model can answer is asked in a short Ray
job, which is submitted, attached to again and stopped as the job of a stage is. What the job found is kept by the
artifact's content where nothing was wrong, so a repeated run starts none. A gate that fails is red, keeps its evidence
in `gate.json`, and stops what comes after it, unless the run's form lets it pass for a reason.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from operators.failures import GateFailed, StageFailed, StageInfrastructureFailed
from operators.links import RayJobLink
from operators.operator import StageOperator
from operators.ray.jobs import JobStatus
from stages.config.errors import ConfigError, DamagedArtifactError, DataError
from stages.config.gate_records import (
    GATE_RECORD,
    NO_PAIRS,
    Check,
    Findings,
    GateOverride,
    GateRecord,
    GateRequest,
    Outcome,
    failed,
    findings_key,
    gate_key,
    passed,
    skipped,
)
from stages.config.gates import ACCURACY_LOW, GatesConfig, gate_name, parse_bounds
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, Stage
from stages.config.invariants import bound_checks, earlier_checks, recorded_checks
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
_RECOMPUTED = "recomputed"
"""The check that stands for all that the job would have made."""
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
        given = None if config.dry_run else config.given_instead(stage)
        if stage not in selection(config) and given is None:
            why = "dry run" if config.dry_run else config.skipped.get(stage, "it runs other stages alone")
            raise AirflowSkipException(f"{stage.value} is not part of this run: {why}")
        if (published := given or ti.xcom_pull(task_ids=stage.value)) is None:
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
            inputs={**_given_start(config, given), **asked.inputs},
            is_given=given is not None,
            gold=_gold(ti, config, stage),
            earlier=None if given else _earlier(config, stage),
            max_pairs=config.gates.max_pairs,
            max_response_length=config.evaluate.max_response_length,
            execution=execution,
            task_id=ti.task_id,
            try_number=ti.try_number,
        )

    def _without_job(self, context: Any, store: "Store", request: Any) -> dict[str, Any] | None:
        """Decide at once where no job is needed, or could not help, or where what it would find is kept."""
        gates, known = self._gates(context, store), what_is_recorded(request)
        if not GRAPH[request.stage].trains:
            return self._decide(context, store, known, Findings(), job=NO_JOB)
        # An artifact that is wrong by its records may be one that no job can load, and red it is already.
        if known.is_red:
            why = "what is recorded is wrong already"
            return self._decide(context, store, known, _left_out(why), job=NO_JOB, no_job=why)
        if not gates.recompute:
            why = f"gates.recompute is off, because {gates.reason}"
            return self._decide(context, store, known, _left_out(why), job=NO_JOB, no_job=why)
        if (kept := _kept(store, request)) is not None:
            return self._decide(context, store, known, kept, job=KEPT)
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
        return self._decide(context, store, what_is_recorded(request), findings, job=outcome.submission_id)

    def _settled(
        self, context: Any, *, run: RunInfo, store: "Store", outcome: "JobOutcome", max_retries: int | None
    ) -> dict[str, Any] | None:
        """A job that died of what no retry can help is a failed check, so that there is a record and a way on."""
        if outcome.status != JobStatus.FAILED:
            return None
        error = self._explained(run=run, store=store, outcome=outcome, max_retries=max_retries)
        if error.retryable:
            return None
        request = self._request(context, run=self._run(context), store=store)
        wrong = failed(_RECOMPUTED, error.message, "a model that its job can load and measure", error.advice)
        findings = Findings(checks=(wrong,))
        why = "its job died"
        return self._decide(context, store, what_is_recorded(request), findings, job=outcome.submission_id, no_job=why)

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
        self, context: Any, store: "Store", known: "Recorded", findings: Findings, *, job: str, no_job: str = ""
    ) -> dict[str, Any]:
        """Make the checks, keep the outcome with its evidence, and raise GateFailed unless the run may go on."""
        from operators.prepare import load_config
        from stages.artifacts.store import write_json

        config = load_config(store, self._run(context))
        by = context["dag_run"].triggering_user_name or ""
        record = judged(
            known, config.gates, findings, job=job, no_job=no_job, by=by, pointless=pointless(config, known)
        )
        run = known.request.run
        keep_earlier_failure(store, run.run_id, record.stage)
        write_json(store, gate_key(run.run_id, record.stage), record.model_dump(mode="json"))
        for check in record.checks:
            logger.log(logging.ERROR if check.outcome is Outcome.FAILED else logging.INFO, "%s", _line(check))
        tell_mlflow(run, record)
        failure_key = gate_key(run.run_id, record.stage, "failure.json")
        if not record.lets_pass:
            error = as_failure(record, where=f"{store.root_uri}/{gate_key(run.run_id, record.stage)}")
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


def _given_start(config: "PipelineConfig", given: ArtifactRef | None) -> dict[str, ArtifactRef]:
    """For a given reward model the given policy of the run, whose answers it will judge."""
    start = config.given.get(BASE_MODEL)
    return {"model": start} if given and start else {}


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


def _earlier(config: "PipelineConfig", stage: Stage) -> ArtifactRef | None:
    """The reward model that the model was trained with which the run starts from, such as a champion; None where that
    was trained with none, or cannot be read."""
    from stages.artifacts.manifests import read_manifest

    spec, start = GRAPH[stage], config.given.get(BASE_MODEL)
    if not spec.learnt_from or start is None:
        return None
    try:
        manifest = read_manifest(start)
    except (DamagedArtifactError, DataError, ConfigError, FileNotFoundError) as error:
        logger.warning("The reward model is not compared with an earlier one: %s", error)
        return None
    return next((entry.ref() for entry in manifest.inputs if entry.role == spec.role), None)


@dataclass(frozen=True)
class Recorded:
    """What the records tell of an artifact."""

    request: GateRequest
    checks: tuple[Check, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_red(self) -> bool:
        return any(check.outcome is Outcome.FAILED for check in self.checks)


def what_is_recorded(request: GateRequest) -> Recorded:
    """Make all checks that need no job; an artifact that cannot be read has failed one. Of a given one the run knows
    no more than that it is there."""
    from stages.artifacts.evidence import read_evidence

    try:
        evidence = read_evidence(request.artifact)
    except (DamagedArtifactError, DataError, FileNotFoundError) as error:
        told = str(error) or "it is gone"
        advice = "Give another reward_model." if request.is_given else f"Clear {request.stage.value} again."
        return Recorded(request, (failed("manifest", told, "the artifact that the stage published", advice),))
    if request.is_given:
        found = f"{request.artifact.uri}, content {request.artifact.digest[:12]}"
        return Recorded(request, (passed("given", found),), evidence.manifest.metrics)
    return Recorded(request, tuple(recorded_checks(evidence, request.inputs)), evidence.manifest.metrics)


def pointless(config: "PipelineConfig", known: Recorded) -> str:
    """Why the run's bounds are not asked of the artifact, "" where they are: a retraining that ends with curate,
    because nothing is new, ends well."""
    from operators.prepare import brings_nothing_new
    from stages.config.curate import NEW_BYTES, NEW_PAIRS

    if known.request.stage is not Stage.CURATE or not {NEW_BYTES, NEW_PAIRS} <= set(known.metrics):
        return ""
    return "nothing is new, and the run ends here" if brings_nothing_new(config, known.metrics) else ""


def judged(
    known: Recorded,
    gates: GatesConfig,
    findings: Findings,
    *,
    job: str,
    by: str,
    no_job: str = "",
    pointless: str = "",
) -> GateRecord:
    """Put everything together that is known of an artifact, and say whether the run may go on; with a reason why
    bounds are pointless, they are skipped."""
    request = known.request
    bounds = gates.bounds_of(request.stage)
    if request.is_given and findings.unmeasured.get(ACCURACY_LOW) == NO_PAIRS:
        no_job = "the run reads no preference pairs; give some, and the reward model is accepted by them or not"
    metrics = {**known.metrics, **findings.metrics}
    kept_bounds = (
        [skipped(bound.metric, pointless) for bound in parse_bounds(bounds)]
        if pointless
        else bound_checks(bounds, metrics, findings.unmeasured, no_job=no_job)
    )
    checks = (*known.checks, *findings.checks, *earlier_checks(findings.metrics, gates), *kept_bounds)
    is_failed = any(check.outcome is Outcome.FAILED for check in checks)
    override = GateOverride(by=by, reason=gates.reason) if is_failed and gates.overrides(request.stage) else None
    return GateRecord(
        stage=request.stage,
        artifact=request.artifact,
        is_given=request.is_given,
        outcome=Outcome.FAILED if is_failed else Outcome.PASSED,
        override=override,
        bounds=bounds,
        checks=checks,
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


def _left_out(why: str) -> Findings:
    return Findings(checks=(skipped(_RECOMPUTED, f"reload, probes and acceptance are left out: {why}"),))


def _kept(store: "Store", request: GateRequest) -> Findings | None:
    """What a job found about this artifact before, unless it is worth another look: what was wrong may have been put
    right since with the same content, what was left undone may be done now, and a damaged record counts as none."""
    key = findings_key(request)
    try:
        kept = parse_record(Findings, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s It is measured again.", error.message)
        return None
    if again := kept.worth_another_look:
        logger.info("What was found before is not kept, it is measured again: %s", again)
        return None
    return kept


def keep_earlier_failure(store: "Store", run_id: str, stage: Stage) -> None:
    """Put a failed record of this run aside, as gate-<n>.json, before another one takes its place."""
    key = gate_key(run_id, stage)
    try:
        data = store.read_bytes(key)
    except FileNotFoundError:
        return
    try:
        if parse_record(GateRecord, data, f"{store.root_uri}/{key}").outcome is not Outcome.FAILED:
            return
    except DataError as error:
        logger.warning("%s It is put aside, too.", error.message)
    number = 1
    while store.exists(earlier := gate_key(run_id, stage, f"gate-{number}.json")):
        number += 1
    store.write_bytes(earlier, data)


def tell_mlflow(run: RunInfo, record: GateRecord) -> None:
    """Put the outcome on the parent run, and on the run that built the artifact, which other runs share: as
    gate-<run id>.json, and the newest one as tag and as gate.json. Warns when MLflow is away."""
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
            if stage_run is None:
                return
            names = [f"gate-{run.run_id}.json"]
            if not record.is_given:  # what another run thinks of a model is not the word of the one that made it
                server.set_tag(stage_run, "athanor.gate", told)
                names.append(GATE_RECORD)
            for name in names:
                server.log_text(stage_run, name, record.model_dump_json(indent=1))
    except MlflowUnavailableError as error:
        logger.warning("MLflow does not have the outcome of %s: %s", gate_name(record.stage), error)
