"""What the tasks of `compare_alignment` do: expand the form, train and evaluate every combination, compare.

Every combination has a folder of its own under `runs/`, with its own configuration, as every instance of a mapped task
has. The tasks `align` and `evaluate` are mapped over the same list, so one combination is one number in both.
"""

import logging
from collections.abc import Mapping
from typing import Any

from airflow.sdk.exceptions import AirflowSkipException

from operators.failures import RunIncomplete, StageConfigFailed, as_stage_failures
from operators.form import form_values
from operators.operator import StageOperator
from operators.prepare import PIPELINE_RECORD, load_config, pipeline_key, read_own
from stages.artifacts.addresses import open_default_store, run_key
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.compare import Combination, CompareConfig, CompareParams
from stages.config.errors import DataError
from stages.config.expansion import expand
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import PipelineConfig
from stages.config.records import parse_record
from stages.config.request import ArtifactRef, Failure, RunInfo, StageRequest, sha256_of
from stages.config.text import one_line
from stages.config.validation import validated

logger = logging.getLogger(__name__)

ALIGN_TASK, EVALUATE_TASK, COMBINATIONS_TASK = "align", Stage.EVALUATE.value, "combinations"
COMPARISON_RECORD = "comparison.json"
_LONGEST_REASON = 500


class ComparisonRecord(Config):
    """What `resolve` stored about a comparison, for its later tasks."""

    title: str
    combinations: tuple[Combination, ...]
    configs: tuple[str, ...]
    """SHA-256 of the configuration of each."""


def start_comparison(context: Any) -> dict[str, Any]:
    """Validate the form, resolve every combination, store the configurations, open the MLflow parent run; return the
    RunInfo as JSON."""
    from operators.run import open_run

    with as_stage_failures():
        values = form_values(context["params"])
        params = validated(CompareParams, values)
        expanded = expand(params)
        configs = with_given([expanded.shared, *expanded.configs], params.overrides)
    info = open_run(context, configs[0], values)
    with as_stage_failures():
        return store_comparison(
            open_default_store(), RunInfo.model_validate(info), params, expanded.combinations, configs[1:]
        ).model_dump(mode="json")


def with_given(configs: list[PipelineConfig], overrides: Mapping[str, Any]) -> list[PipelineConfig]:
    """Fix the given models of all configurations, each looked up once: an alias must not move in between."""
    from operators.given import given_artifacts, kept_apart_from_gold

    given = given_artifacts(configs[0])
    return [kept_apart_from_gold(config.with_given(given), overrides) for config in configs]


def store_comparison(
    store: Store,
    run: RunInfo,
    params: CompareParams,
    combinations: tuple[Combination, ...],
    configs: list[PipelineConfig],
) -> RunInfo:
    """Store what the later tasks read; return the run with the digest of the record."""
    digests = []
    for number, config in enumerate(configs):
        stored = config.model_dump_json(indent=1).encode()
        store.write_bytes(pipeline_key(folder_of(run, number)), stored)
        digests.append(sha256_of(stored))
    record = ComparisonRecord(title=params.run_name, combinations=combinations, configs=tuple(digests))
    stored = record.model_dump_json(indent=1).encode()
    store.write_bytes(f"runs/{run.run_id}/{COMPARISON_RECORD}", stored)
    for number, combination in enumerate(combinations):
        logger.info("%d: %s (%s)", number, combination.name, combination.stage.value)
    return run.model_copy(update={"records": {**run.records, COMPARISON_RECORD: sha256_of(stored)}})


def folder_of(run: RunInfo, number: int) -> str:
    """The folder under `runs/` of one combination."""
    return f"{run.run_id}.{number}"


def read_comparison(store: Store, run: RunInfo) -> ComparisonRecord:
    """Read what `resolve` stored; raises DataError when it is not what that task wrote."""
    key = f"runs/{run.run_id}/{COMPARISON_RECORD}"
    try:
        return parse_record(ComparisonRecord, read_own(store, run, COMPARISON_RECORD), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        raise DataError(f"{store.root_uri}/{key} does not exist", advice="Clear the task `resolve`.") from None


def expanded_tasks(store: Store, run: RunInfo) -> list[dict[str, Any]]:
    """Return, for each combination, the stage that trains it and the run as that stage knows it."""
    record = read_comparison(store, run)
    return [
        {
            "name": combination.name,
            "stage": combination.stage.value,
            "run": run.model_copy(
                update={"run_id": folder_of(run, number), "records": {PIPELINE_RECORD: digest}}
            ).model_dump(mode="json"),
        }
        for number, (combination, digest) in enumerate(zip(record.combinations, record.configs, strict=True))
    ]


def combinations_of(context: Any) -> list[dict[str, Any]]:
    """`expanded_tasks` of this run, over which the trainings and the evaluations are mapped."""
    with as_stage_failures():
        return expanded_tasks(open_default_store(), _run_of(context))


class AlignOperator(StageOperator):
    """The training of one combination; mapped over what the task `combinations` returned."""

    def __init__(self, *, combination: dict[str, Any], **kwargs: Any) -> None:
        self.combination = combination
        # No asset event: a model of a comparison is no news for those who wait for aligned models.
        super().__init__(**{"stage": combination["stage"], "outlets": [], **kwargs})

    def _run(self, context: Any) -> RunInfo:
        return RunInfo.model_validate(self.combination["run"])

    def _run_of_instance(self, ti: Any, run: RunInfo) -> RunInfo:
        return run


class AlignedEvaluationOperator(AlignOperator):
    """The evaluation of one combination; skips itself where its training left no model."""

    def __init__(self, *, combination: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(combination=combination, **{"stage": Stage.EVALUATE, **kwargs})

    def _made_by(self, ti: Any, source: Stage) -> Any:
        if source.value != self.combination["stage"]:
            return super()._made_by(ti, source)
        model = ti.xcom_pull(task_ids=ALIGN_TASK, map_indexes=ti.map_index)
        if model is None:
            raise AirflowSkipException(f"{ALIGN_TASK} [{ti.map_index}] left no model, so there is nothing to evaluate")
        return model


class CompareOperator(StageOperator):
    """The stage `compare` over whatever has a result."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"stage": Stage.COMPARE, **kwargs})

    def _request(self, context: Any, *, run: RunInfo, store: Store) -> StageRequest:
        ti = context["ti"]
        request = comparison_request(
            store,
            run,
            models=_returned(ti, ALIGN_TASK, len(read_comparison(store, run).combinations)),
            evaluations=_returned(ti, EVALUATE_TASK, len(read_comparison(store, run).combinations)),
        )
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number})


def comparison_request(
    store: Store, run: RunInfo, *, models: Mapping[int, Any], evaluations: Mapping[int, Any]
) -> StageRequest:
    """Build the request of `compare` from what the mapped tasks returned, by number; raises StageConfigFailed when no
    combination has a result, because there is nothing to compare then."""
    record = read_comparison(store, run)
    inputs: dict[str, ArtifactRef] = {}
    failures: dict[int, str] = {}
    for number, combination in enumerate(record.combinations):
        if number in models and number in evaluations:
            inputs[f"model.{number}"] = ArtifactRef.model_validate(models[number])
            inputs[f"evaluation.{number}"] = ArtifactRef.model_validate(evaluations[number])
        else:
            stage = Stage.EVALUATE if number in models else combination.stage
            failures[number] = reason_of_failure(store, run, number, stage)
    if len(failures) == len(record.combinations):
        told = "; ".join(f"{record.combinations[number].name}: {why}" for number, why in failures.items())
        raise StageConfigFailed(f"No combination has a result. {told}", advice="See the logs of the trainings.")
    config = CompareConfig(title=record.title, combinations=record.combinations, failures=failures)
    return StageRequest(
        stage=Stage.COMPARE,
        run=run,
        store_uri=store.root_uri,
        config=config.model_dump(mode="json"),
        execution=load_config(store, run).stage_execution(Stage.COMPARE),
        inputs=inputs,
    )


def reason_of_failure(store: Store, run: RunInfo, number: int, stage: Stage) -> str:
    """Why a combination has no result: what its job recorded, or that it recorded nothing."""
    key = run_key(folder_of(run, number), stage, "failure.json")
    try:
        failure = parse_record(Failure, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return f"{stage.value} ended without a result and recorded no reason; see the log of its task"
    except DataError as error:
        return f"{stage.value} failed, and its record cannot be read: {one_line(error.message, at_most=200)}"
    return f"{stage.value} failed ({failure.category}): {one_line(failure.message, at_most=_LONGEST_REASON)}"


def finish_comparison(context: Any) -> None:
    """End the MLflow runs; raises RunIncomplete unless every combination has a result and the page exists."""
    from operators.mlflow import end_parent_run, end_stage_runs

    ti = context["ti"]
    value = ti.xcom_pull(task_ids="resolve")
    if value is None:
        raise RunIncomplete("The comparison never started.", advice="The log of task 'resolve' says why.")
    run = RunInfo.model_validate(value)
    with as_stage_failures():
        record = read_comparison(open_default_store(), run)
    count = len(record.combinations)
    evaluated = _returned(ti, EVALUATE_TASK, count)
    missing = [one.name for number, one in enumerate(record.combinations) if number not in evaluated]
    compared = ti.xcom_pull(task_ids=GRAPH[Stage.COMPARE].stage.value) is not None
    for folder in (run.run_id, *(folder_of(run, number) for number in range(count))):
        end_stage_runs(run.model_copy(update={"run_id": folder}), killed=True)
    end_parent_run(run, succeeded=compared and not missing)
    if not compared:
        raise RunIncomplete("There is no page.", advice="The log of task 'compare' says why.")
    if missing:
        raise RunIncomplete(
            f"{len(missing)} of {count} combinations have no result: {'; '.join(missing)}.",
            advice="The page shows the others, and why these failed. Clear them and `compare` to try again.",
        )


def _run_of(context: Any) -> RunInfo:
    return RunInfo.model_validate(context["ti"].xcom_pull(task_ids="resolve"))


def _returned(ti: Any, task_id: str, count: int) -> dict[int, Any]:
    """What the instances of a mapped task returned, by their number; those that failed or were skipped are not in it.

    Each is asked for by itself, because a list of all does not say whose value is missing.
    """
    found = {number: ti.xcom_pull(task_ids=task_id, map_indexes=number) for number in range(count)}
    return {number: value for number, value in found.items() if value is not None}
