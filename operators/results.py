"""What a Ray job left in the store: its result, or the reason why there is none."""

import logging

from operators.failures import (
    StageFailed,
    StageInfrastructureFailed,
    StageLost,
    StageStalled,
    StageStopped,
    job_failure,
    stage_failure,
)
from operators.ray.jobs import JobStatus
from operators.ray.watch import Outcome
from stages.artifacts.addresses import artifact_uri, run_key
from stages.artifacts.store import Store
from stages.config.errors import Category, DataError
from stages.config.graph import GRAPH, Stage
from stages.config.records import parse_record
from stages.config.request import Failure, RunInfo, StageResult

logger = logging.getLogger(__name__)


def read_result(stage: Stage, *, run: RunInfo, store: Store, outcome: Outcome, max_retries: int | None) -> StageResult:
    """Read `result.json` of a job that succeeded."""
    key = run_key(run.run_id, stage, "result.json")
    try:
        result = parse_record(StageResult, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        raise StageInfrastructureFailed(
            f"Ray job {outcome.submission_id} succeeded, but {store.root_uri}/{key} does not exist.",
            advice="Check that Airflow and the Ray cluster see the same ARTIFACT_STORE.",
            max_retries=max_retries,
        ) from None
    artifact, kind = result.artifact, GRAPH[stage].kind
    own = artifact_uri(store, kind, artifact.fingerprint)
    if (result.stage, artifact.kind, artifact.uri) != (stage, kind, own):
        raise DataError(
            f"{store.root_uri}/{key} names {artifact.kind} {artifact.uri} as what {result.stage.value} made; what "
            f"{stage.value} makes lies at {own}",
            advice="Something else wrote it. Clear the task; see who may write to the store.",
        )
    return result


def explain_failure(
    stage: Stage, *, run: RunInfo, store: Store, outcome: Outcome, max_retries: int | None
) -> StageFailed:
    """Return the exception for a job that did not succeed; the job's own `failure.json` knows best."""
    match JobStatus(outcome.status):
        case JobStatus.UNREACHABLE:
            return StageInfrastructureFailed(
                f"Ray did not answer: {outcome.message}.",
                advice="The job was left alone; the retry attaches to it if it still runs.",
                max_retries=max_retries,
            )
        case JobStatus.STOPPED:
            return StageStopped(
                f"Ray job {outcome.submission_id} was stopped on the Ray side.",
                advice="Clear the task to start it again from its last checkpoint.",
            )
        case JobStatus.LOST:
            return StageLost(
                f"Ray job {outcome.submission_id} is lost: {outcome.message} (was the head restarted?).",
                advice="The retry resumes from the last checkpoint.",
                max_retries=max_retries,
            )
        case JobStatus.STALLED:
            return StageStalled(
                f"{outcome.message}; Ray job {outcome.submission_id} was stopped.",
                advice="The retry resumes from the last checkpoint; "
                f"raise execution.{stage.value}.stall_seconds if nothing hangs and the stage is that slow.",
                max_retries=max_retries,
            )
        case JobStatus.UNPLACED:
            return StageInfrastructureFailed(
                f"{outcome.message}; Ray job {outcome.submission_id} was stopped before it began.",
                advice="Add nodes, wait for other jobs, lower "
                f"execution.{stage.value}.entrypoint_cpus, or raise execution.{stage.value}.capacity_seconds.",
                max_retries=max_retries,
            )
        case _:
            told = told_failure(store, run_key(run.run_id, stage, "failure.json"), max_retries=max_retries)
            return told or job_failure(outcome.job, stage, max_retries=max_retries)


def told_failure(store: Store, key: str, *, max_retries: int | None) -> StageFailed | None:
    """What the job wrote about its failure. None when it wrote nothing that can be read: its exit code also tells."""
    try:
        failure = parse_record(Failure, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s The job's exit code decides.", error.message)
        return None
    if (told := stage_failure(failure, max_retries=max_retries)) is None:
        known = ", ".join(Category)
        logger.warning(
            "%s/%s: category=%r is unknown (allowed: %s), the job's exit code decides; it says: %s",
            store.root_uri,
            key,
            failure.category,
            known,
            failure.message,
        )
    return told
