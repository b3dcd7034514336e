"""What the tasks of `collect_preferences` do: find the model, ask the questions, publish the answers."""

import logging
from collections.abc import Mapping
from typing import Any

from airflow.sdk import Asset

from operators.failures import RunIncomplete, StageConfigFailed, as_stage_failures
from operators.folders import claim_folder
from operators.form import form_values
from operators.given import given_artifact
from operators.mlflow import note_artifact
from operators.operator import StageOperator
from operators.people.answers import complete, publish_preferences
from operators.people.rating import read_responses, shown_order
from operators.prepare import PIPELINE_RECORD, read_own
from stages.artifacts.addresses import open_default_store
from stages.artifacts.manifests import read_manifest
from stages.artifacts.store import Store
from stages.config.collect import RespondConfig
from stages.config.errors import ConfigError
from stages.config.forms import CollectParams
from stages.config.graph import Stage, language_models
from stages.config.records import parse_record
from stages.config.request import ArtifactRef, RunInfo, StageRequest, sha256_of
from stages.config.resolve import resolve
from stages.config.text import one_line
from stages.config.validation import validated

PREFERENCES = Asset(name="llm/preferences", group="llm")
_TITLE_LENGTH = 60

logger = logging.getLogger(__name__)


REQUEST_RECORD = "request.json"


def request_key(run_id: str) -> str:
    return f"runs/{run_id}/{REQUEST_RECORD}"


def load_request(store: Store, run: RunInfo) -> StageRequest:
    """Read the request of `respond` that the task `resolve` stored for this run."""
    key = request_key(run.run_id)
    try:
        request = parse_record(StageRequest, read_own(store, run, REQUEST_RECORD), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        raise ConfigError(
            f"{store.root_uri}/{key} does not exist", advice="Clear the task `resolve`; it writes the file."
        ) from None
    return request.model_copy(update={"run": run})


class RespondOperator(StageOperator):
    """The stage `respond`, whose request the task `resolve` has written, because its model is of another run."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("stage", Stage.RESPOND)
        super().__init__(**kwargs)

    def _request(self, context: Any, *, run: RunInfo, store: Store) -> StageRequest:
        request, ti = load_request(store, run), context["ti"]
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number})


def start_collection(context: Any) -> dict[str, Any]:
    """Validate the form, find the model and its tokens, store the request of `respond`; return the RunInfo as JSON."""
    from operators.mlflow import open_parent_run

    ti = context["ti"]
    with as_stage_failures():
        params = validated(CollectParams, form_values(context["params"]))
        pipeline = resolve({"recipe": params.recipe, "run_name": params.run_name, "overrides": params.overrides})
        model, tokens = find_model(params.model or f"models:/{params.run_name}-aligned@candidate")
        store = open_default_store()
        run_id = claim_folder(store, ti.dag_id, ti.run_id)
        run = RunInfo(
            run_id=run_id,
            name=params.run_name,
            dag_id=ti.dag_id,
            airflow_run_id=ti.run_id,
            airflow_url=ti.log_url.split("/tasks/")[0],
        )
        run = run.model_copy(update={"parent_run_id": open_parent_run(run)})
        config = RespondConfig(
            prompts=tuple(params.prompts),
            num_prompts=params.num_prompts,
            num_responses=params.num_responses,
            temperature=params.temperature,
            max_response_length=params.max_response_length,
            seed=params.seed,
        )
        request = StageRequest(
            stage=Stage.RESPOND,
            run=run,
            store_uri=store.root_uri,
            config=config.model_dump(mode="json"),
            execution=pipeline.stage_execution(Stage.RESPOND),
            inputs={"model": model, "tokens": tokens},
        )
        # The operator reads it after a timeout, for the retries that the stage may have.
        stored = {
            PIPELINE_RECORD: pipeline.model_dump_json(indent=1).encode(),
            REQUEST_RECORD: request.model_dump_json(indent=1).encode(),
        }
        for name, data in stored.items():
            store.write_bytes(f"runs/{run_id}/{name}", data)
        run = run.model_copy(update={"records": {name: sha256_of(data) for name, data in stored.items()}})
    logger.info("Run %s: %d responses of %s to each prompt.", run_id, params.num_responses, model.uri)
    return run.model_dump(mode="json")


def find_model(uri: str) -> tuple[ArtifactRef, ArtifactRef]:
    """Return a language model and the tokens it was trained with; ConfigError when it is not one that Athanor made."""
    advice = "Give models:/name@alias, models:/name/version, or the URI of a base, SFT or aligned model's artifact."
    model = given_artifact(uri, field="model")
    manifest = read_manifest(model)
    allowed = [spec.kind for spec in language_models()]
    if manifest.kind not in allowed:
        raise ConfigError(
            f"model={uri!r} is a {manifest.kind}; allowed: {', '.join(allowed)}",
            advice="Choose a model that writes responses.",
        )
    tokens = next((entry for entry in manifest.inputs if entry.role == "tokens"), None)
    if tokens is None:
        raise ConfigError(f"model={uri!r} does not say which tokens it was trained with", advice=advice)
    return model, tokens.ref()


def make_questions(responses: Mapping[str, Any], store: Store, run: RunInfo) -> list[dict[str, Any]]:
    """One question per prompt, small enough for XCom: the place of its responses and the order of showing them."""
    seed = RespondConfig.model_validate(load_request(store, run).config).seed
    return [
        {
            "index": index,
            "title": one_line(row["prompt"])[:_TITLE_LENGTH],
            "order": shown_order(len(row["responses"]), seed=seed, prompt_id=row["id"]),
        }
        for index, row in enumerate(read_responses(ArtifactRef.model_validate(responses)))
    ]


def questions_of(context: Any) -> list[dict[str, Any]]:
    """`make_questions` of this run."""
    ti = context["ti"]
    run = RunInfo.model_validate(ti.xcom_pull(task_ids="resolve"))
    with as_stage_failures():
        return make_questions(ti.xcom_pull(task_ids=Stage.RESPOND.value), open_default_store(), run)


def publish_answers(context: Any) -> dict[str, Any]:
    """Publish what `rate` collected in this run and emit the asset event."""
    ti = context["ti"]
    given = ti.xcom_pull(task_ids=Stage.RESPOND.value)
    questions = ti.xcom_pull(task_ids="questions")
    if given is None or questions is None:
        raise StageConfigFailed(
            "No question was asked: `respond` or `questions` did not succeed.", advice="See their logs."
        )
    run = RunInfo.model_validate(ti.xcom_pull(task_ids="resolve"))
    responses = ArtifactRef.model_validate(given)
    answers = ti.xcom_pull(task_ids=Stage.RATE.value, map_indexes=range(len(questions)))
    with as_stage_failures():
        rows = read_responses(responses)
        ref, manifest = publish_preferences(
            open_default_store(), responses, complete(rows, answers, questions), run=run
        )
    note_artifact(run, Stage.RATE.value, ref, hit=False)
    event = {**ref.model_dump(mode="json", exclude_none=True), "run_id": run.run_id, "pairs": manifest.ledger["pairs"]}
    context["outlet_events"][PREFERENCES].extra = event
    logger.info("Published %s: %s", ref.uri, manifest.ledger)
    return ref.model_dump(mode="json")


def finish_collection(context: Any) -> None:
    """End the MLflow parent run; raises RunIncomplete unless preferences were published."""
    from operators.mlflow import end_parent_run

    ti = context["ti"]
    value = ti.xcom_pull(task_ids="resolve")
    if value is None:
        raise RunIncomplete("The run never started.", advice="The log of task 'resolve' says why.")
    published = ti.xcom_pull(task_ids="publish") is not None
    end_parent_run(RunInfo.model_validate(value), succeeded=published)
    if not published:
        raise RunIncomplete("No preferences were published.", advice="The log of task 'publish' says why.")
