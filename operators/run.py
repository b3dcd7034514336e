"""Start and end of a pipeline run: from the form to a stored configuration, and MLflow's parent run."""

import logging
from typing import TYPE_CHECKING, Any

from operators.failures import RunIncomplete, as_stage_failures
from operators.form import form_values
from operators.mlflow import end_parent_run, end_stage_runs, open_parent_run
from stages.config.errors import DataError
from stages.config.gates import gate_name
from stages.config.graph import Stage, gated_stages
from stages.config.request import RunInfo, sha256_of
from stages.config.review import REVIEW_TASK

if TYPE_CHECKING:
    from stages.artifacts.store import Store
    from stages.config.pipeline import PipelineConfig

logger = logging.getLogger(__name__)


def start_run(context: Any) -> dict[str, Any]:
    """Validate the trigger form, store the PipelineConfig, open the MLflow parent run; return the RunInfo as JSON.

    Raises StageConfigFailed, which is never retried, naming field, value and what is allowed.
    """
    from operators.given import given_artifacts, kept_apart_from_gold
    from stages.config.resolve import parse_params, resolve

    with as_stage_failures():
        values = form_values(context["params"])
        config = resolve(values)
        config = config.with_given(given_artifacts(config))
        config = kept_apart_from_gold(config, parse_params(values).overrides)
    return open_run(context, config, values)


def open_run(context: Any, config: "PipelineConfig", values: dict[str, Any]) -> dict[str, Any]:
    """Store a configuration and the form's values that it was made from, look at the models that the run is given, open
    the MLflow parent run.

    Raises what the job that looks at them ended with, before there is anything in MLflow that would have to end too.
    """
    from operators.endpoint import require_sealable_keys
    from operators.folders import claim_folder
    from operators.look import look_at_models
    from operators.prepare import PIPELINE_RECORD, params_key, pipeline_key
    from stages.artifacts.addresses import open_default_store
    from stages.artifacts.store import write_json
    from stages.config.suites import check_suites

    ti = context["ti"]
    with as_stage_failures():
        require_sealable_keys(config)
        store = open_default_store()
        run_id = claim_folder(store, ti.dag_id, ti.run_id)
        stored = config.model_dump_json(indent=1).encode()
        store.write_bytes(pipeline_key(run_id), stored)
        write_json(store, params_key(run_id), values)
    run = RunInfo(
        run_id=run_id,
        name=config.run_name,
        dag_id=ti.dag_id,
        airflow_run_id=ti.run_id,
        airflow_url=ti.log_url.split("/tasks/")[0],
        experiment=config.experiment,
        records={PIPELINE_RECORD: sha256_of(stored)},
    )
    look = look_at_models(context, store, run, config)
    with as_stage_failures():
        if look.benchmarks:
            check_suites(config, look.suites())
        run = run.model_copy(update={"parent_run_id": open_parent_run(run)})
    logger.info(
        "Run %s: recipe %s, alignment %s, until %s.", run_id, config.recipe, config.alignment, config.last_stage
    )
    return run.model_dump(mode="json")


def finish_run(context: Any, *, resolve_task_id: str = "resolve", plan_task_id: str = "plan") -> None:
    """End the MLflow parent run: FINISHED when every stage that the run asked for succeeded, else FAILED.

    A dry run asks for its plan.

    Raises RunIncomplete in the second case, so that the run fails even when a person marked it failed on its way:
    Airflow then skips the remaining tasks, and skipped tasks alone would let the run succeed.
    """
    from operators.prepare import load_config
    from stages.artifacts.addresses import open_default_store

    ti = context["ti"]
    value = ti.xcom_pull(task_ids=resolve_task_id)
    if value is None:
        raise RunIncomplete("The run never started.", advice=f"The log of task {resolve_task_id!r} says why.")
    run = RunInfo.model_validate(value)
    with as_stage_failures():
        store = open_default_store()
        config = load_config(store, run)
        wanted = {plan_task_id} if config.dry_run else _wanted(config)
    states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id]).get(ti.run_id, {})
    unfinished = [
        f"{task} {states[task]}"
        for task in (plan_task_id, REVIEW_TASK, *Stage, *map(gate_name, gated_stages()))
        if task in wanted & states.keys() and states[task] != "success"
    ]
    with as_stage_failures():
        unfinished += [
            told
            for stage in gated_stages()
            if gate_name(stage) in wanted and states.get(gate_name(stage)) == "success"
            if (told := _passed_by_hand(store, run, stage))
        ]
    end_stage_runs(run, killed=True)
    end_parent_run(run, succeeded=not unfinished)
    with as_stage_failures():
        _tell_undelivered(store, run)
    if unfinished:
        raise RunIncomplete(f"Not every stage succeeded: {', '.join(unfinished)}.")


def _wanted(config: "PipelineConfig") -> set[str]:
    """The tasks that must succeed: stages, the gates after them, or of what is given in their place, and a review that
    was asked for."""
    selected = config.selected
    gated = (stage for stage in gated_stages() if stage in selected or config.given_instead(stage))
    return {*selected, *map(gate_name, gated), *([REVIEW_TASK] if config.reviewed else [])}


def _passed_by_hand(store: "Store", run: RunInfo, stage: Stage) -> str:
    """What is wrong with a green gate: a person who marks it as success in Airflow gives no reason; empty if nothing
    is."""
    from stages.config.gate_records import GateRecord, gate_key
    from stages.config.records import parse_record

    key = gate_key(run.run_id, stage)
    way = f"trigger the run again with override_gates={stage.value} and override_reason"
    try:
        record = parse_record(GateRecord, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return f"{gate_name(stage)} was marked as success before it had decided; clear it, or {way}"
    except DataError as error:
        return f"{gate_name(stage)}: {error.message}"
    if record.lets_pass:
        return ""
    return f"{gate_name(stage)} was marked as success, but failed ({record.summary()}); {way}"


def _tell_undelivered(store: "Store", run: RunInfo) -> None:
    """Log what MLflow lacks of the run, because it was unreachable until the end, and how to deliver it."""
    from stages.tracking.spool import SPOOL_NAME

    waiting = [key for key in store.list(f"runs/{run.run_id}") if key.endswith(f"/{SPOOL_NAME}")]
    if waiting:
        logger.warning(
            "MLflow was away and does not have all of this run; nothing is lost. What is missing waits in %s under %s. "
            "When MLflow is back: python -m stages.tracking %s",
            store.root_uri,
            ", ".join(waiting),
            run.run_id,
        )
