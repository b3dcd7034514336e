"""`collect_preferences` around the people: which model responds to what, and what becomes of the answers."""

import csv
import hashlib
import io
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import Asset

from operators.failures import (
    RunIncomplete,
    StageConfigFailed,
    StageDataFailed,
    as_stage_failures,
)
from operators.form import form_values
from operators.operator import StageOperator
from operators.people.rating import LABELS, Outcome, read_responses, shown_order
from stages.artifacts.addresses import artifact_uri, open_default_store
from stages.artifacts.manifests import (
    canonical_json,
    content_digest,
    find_intact,
    fingerprint,
    publish,
    read_manifest,
    upload_files,
    utc_now,
)
from stages.artifacts.store import Store, write_json
from stages.config.collect import CollectParams, RateConfig, RespondConfig
from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH, Stage, language_models
from stages.config.request import ArtifactRef, InputEntry, Manifest, RunInfo, StageRequest, safe_run_id
from stages.config.resolve import validated

PREFERENCES = Asset(name="llm/preferences", group="llm")
PREFERENCES_FILE = "preferences.jsonl"
_TITLE_LENGTH = 60
_ANSWER_COLUMNS = ("prompt_id", "outcome", "order", "ranking", "reasons", "comment", "by", "at")

logger = logging.getLogger(__name__)


def request_key(run_id: str) -> str:
    return f"runs/{run_id}/request.json"


def _store() -> Store:
    return open_default_store()


class RespondOperator(StageOperator):
    """The stage `respond`, whose request the task `resolve` has written: no PipelineConfig is behind it."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("stage", Stage.RESPOND)
        super().__init__(**kwargs)

    def _request(self, context: Any, *, run: RunInfo, store: Store) -> StageRequest:
        key = request_key(run.run_id)
        try:
            request = StageRequest.model_validate_json(store.read_bytes(key))
        except FileNotFoundError:
            raise ConfigError(
                f"{store.root_uri}/{key} does not exist", advice="Clear the task `resolve`; it writes the file."
            ) from None
        ti = context["ti"]
        return request.model_copy(update={"task_id": ti.task_id, "try_number": ti.try_number})


# ------------------------------------------------------------- beginning


def start_collection(context: Any) -> dict[str, Any]:
    """Validate the form, find the model and its tokens, store the request of `respond`; return the RunInfo as JSON."""
    from operators.mlflow import open_parent_run

    ti = context["ti"]
    with as_stage_failures():
        params = validated(CollectParams, form_values(context["params"]))
        model, tokens = find_model(params.model or f"models:/{params.run_name}-aligned@candidate")
        store = _store()
        run_id = safe_run_id(ti.run_id)
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
            execution=ExecutionConfig(),
            inputs={"model": model, "tokens": tokens},
        )
        write_json(store, request_key(run_id), request.model_dump(mode="json"))
    logger.info("Run %s: %d responses of %s to each prompt.", run_id, params.num_responses, model.uri)
    return run.model_dump(mode="json")


def find_model(uri: str) -> tuple[ArtifactRef, ArtifactRef]:
    """Return a language model and the tokens it was trained with; ConfigError when it is not one that Athanor made."""
    where = _registered_artifact(uri) if uri.startswith("models:/") else uri
    advice = "Give models:/name@alias, models:/name/version, or the URI of a base, SFT or aligned model's artifact."
    if "/artifacts/" not in where:
        raise ConfigError(f"model={uri!r} is no artifact of Athanor", advice=advice)
    try:
        manifest = read_manifest(where)
    except FileNotFoundError:
        raise ConfigError(f"model={uri!r}: {where} does not exist", advice=advice) from None
    allowed = [spec.kind for spec in language_models()]
    if manifest.kind not in allowed:
        raise ConfigError(
            f"model={uri!r} is a {manifest.kind}; allowed: {', '.join(allowed)}",
            advice="Choose a model that writes responses.",
        )
    tokens = next((entry for entry in manifest.inputs if entry.role == "tokens"), None)
    if tokens is None:
        raise ConfigError(f"model={uri!r} does not say which tokens it was trained with", advice=advice)
    return manifest.ref(where), ArtifactRef(**tokens.model_dump(exclude={"role"}))


def _registered_artifact(uri: str) -> str:
    from operators.given import find_version

    found = find_version(uri)
    if found is None or not (artifact := found.tags.get("artifact.uri")):
        raise ConfigError(
            f"model={uri!r} is not registered in MLflow, or not by Athanor",
            advice="Run llm_pipeline until promote under this run name, or name another model.",
        )
    return artifact


# ------------------------------------------------------------- questions


def make_questions(responses: Mapping[str, Any], store: Store, run: RunInfo) -> list[dict[str, Any]]:
    """One question a prompt, small enough for XCom: where its responses lie, and in which order they are shown."""
    request = StageRequest.model_validate_json(store.read_bytes(request_key(run.run_id)))
    return [
        {
            "index": index,
            "title": " ".join(row["prompt"].split())[:_TITLE_LENGTH],
            "order": shown_order(len(row["responses"]), seed=request.config["seed"], prompt_id=row["id"]),
        }
        for index, row in enumerate(read_responses(ArtifactRef.model_validate(responses)))
    ]


def questions_of(context: Any) -> list[dict[str, Any]]:
    """`make_questions` of this run."""
    ti = context["ti"]
    run = RunInfo.model_validate(ti.xcom_pull(task_ids="resolve"))
    with as_stage_failures():
        return make_questions(ti.xcom_pull(task_ids=Stage.RESPOND.value), _store(), run)


# --------------------------------------------------------------- answers


def pairs_of(row: Mapping[str, Any], answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All ordered pairs of a ranking, k(k-1)/2 of k responses, in the shape that `preferences` sources have."""
    ranked = [row["responses"][index] for index in answer["ranking"]]
    judged = {name: answer[name] for name in ("reasons", "comment", "by", "at", "order")}
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse, "prompt_id": row["id"], **judged}
        for place, better in enumerate(ranked)
        for worse in ranked[place + 1 :]
    ]


def account(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was asked and what came back; the sum conserves."""
    outcomes = Counter(Outcome(answer["outcome"]) for answer in answers)
    ledger = {"asked": len(rows), **{outcome.value: outcomes[outcome] for outcome in Outcome}}
    if ledger["asked"] != sum(outcomes.values()):
        raise AssertionError(f"the ledger of the answers does not conserve: {ledger}")
    return ledger


def complete(
    rows: Sequence[Mapping[str, Any]], answers: Iterable[Mapping[str, Any] | None], questions: Sequence[Any]
) -> list[dict[str, Any]]:
    """One answer for each prompt, in their order; a task that ended without one (marked failed) left it unanswered."""
    given = {answer["index"]: dict(answer) for answer in answers if answer is not None}
    silent = {"outcome": Outcome.UNANSWERED.value, "ranking": [], "reasons": [], "by": "", "at": ""}
    silent["comment"] = "the task ended without an answer"
    return [
        {**given.get(index, {**silent, "index": index, "order": questions[index]["order"]}), "prompt_id": row["id"]}
        for index, row in enumerate(rows)
    ]


def publish_preferences(
    store: Store, responses: ArtifactRef, answers: Sequence[Mapping[str, Any]], *, run: RunInfo
) -> tuple[ArtifactRef, Manifest]:
    """Publish the pairs that the answers amount to, with their lineage to the responses and to the model."""
    rows = read_responses(responses)
    ledger = account(rows, answers)
    pairs = [
        pair
        for row, answer in zip(rows, answers, strict=True)
        if answer["outcome"] == Outcome.ANSWERED
        for pair in pairs_of(row, answer)
    ]
    if not pairs:
        raise StageDataFailed(
            f"No answer prefers one response to another: {ledger}.",
            advice="Nothing is published. Clear the tasks `rate` to ask again.",
        )
    digest = hashlib.sha256(canonical_json([dict(answer) for answer in answers])).hexdigest()
    config, spec = RateConfig(answers_digest=digest), GRAPH[Stage.RATE]
    identity = fingerprint(Stage.RATE, config, inputs={"responses": responses})
    where = artifact_uri(store, spec.kind, identity)
    if existing := find_intact(store, spec.kind, identity):
        return existing.ref(where), existing
    with tempfile.TemporaryDirectory() as scratch:
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (Path(scratch) / PREFERENCES_FILE).write_text(lines, encoding="utf-8")
        (Path(scratch) / "answers.csv").write_text(_csv(answers), encoding="utf-8")
        files = upload_files(store, Path(scratch), kind=spec.kind, fingerprint=identity)
    model = [entry for entry in read_manifest(responses).inputs if entry.role == "model"]
    manifest = Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=identity,
        digest=content_digest(files),
        files=files,
        inputs=(InputEntry(role="responses", **responses.model_dump(include=_INPUT_FIELDS)), *model),
        config=config.model_dump(mode="json"),
        execution={"airflow.dag_id": run.dag_id, "airflow.run_id": run.airflow_run_id},
        metrics={"rate/pairs": float(len(pairs)), **{f"rate/{name}": float(count) for name, count in ledger.items()}},
        ledger={"questions": ledger, "pairs": len(pairs)},
        created_at=utc_now(),
    )
    return publish(store, manifest), manifest


_INPUT_FIELDS = {"kind", "uri", "fingerprint", "digest"}


def _csv(answers: Sequence[Mapping[str, Any]]) -> str:
    """Every answer, those without a pair included, as a table; by letters as they were shown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _ANSWER_COLUMNS)
    writer.writeheader()
    for answer in answers:
        letters = [LABELS[answer["order"].index(index)] for index in answer["ranking"]]
        told = {"ranking": " > ".join(letters), "reasons": " ".join(answer["reasons"])}
        told["order"] = " ".join(str(index) for index in answer["order"])
        writer.writerow({name: told.get(name, answer[name]) for name in _ANSWER_COLUMNS})
    return text.getvalue()


def publish_answers(context: Any) -> dict[str, Any]:
    """Publish what `rate` collected in this run and emit the asset event."""
    ti = context["ti"]
    given = ti.xcom_pull(task_ids=Stage.RESPOND.value)
    questions = ti.xcom_pull(task_ids="questions")
    if given is None or questions is None:
        raise StageConfigFailed("Nobody was asked: `respond` or `questions` did not succeed.", advice="See their logs.")
    run = RunInfo.model_validate(ti.xcom_pull(task_ids="resolve"))
    responses = ArtifactRef.model_validate(given)
    answers = ti.xcom_pull(task_ids=Stage.RATE.value, map_indexes=range(len(questions)))
    with as_stage_failures():
        rows = read_responses(responses)
        ref, manifest = publish_preferences(_store(), responses, complete(rows, answers, questions), run=run)
    _note_on_parent(run, ref)
    event = {**ref.model_dump(mode="json", exclude_none=True), "run_id": run.run_id, "pairs": manifest.ledger["pairs"]}
    context["outlet_events"][PREFERENCES].extra = event
    logger.info("Published %s: %s", ref.uri, manifest.ledger)
    return ref.model_dump(mode="json")


def _note_on_parent(run: RunInfo, ref: ArtifactRef) -> None:
    """The parent run tells which preferences came of it; MLflow being away is a warning."""
    from operators.mlflow import MlflowServer, MlflowUnavailableError

    if run.parent_run_id is None:
        return
    try:
        with MlflowServer(os.environ["MLFLOW_TRACKING_URI"]) as server:
            told = {"hit": False, "uri": ref.uri, "fingerprint": ref.fingerprint}
            server.set_tag(run.parent_run_id, f"athanor.stage.{Stage.RATE.value}", json.dumps(told))
    except MlflowUnavailableError as error:
        logger.warning("The MLflow parent run does not tell of %s: %s", ref.uri, error)


def finish_collection(context: Any) -> None:
    """End the MLflow parent run; red unless preferences were published."""
    from operators.mlflow import end_parent_run

    ti = context["ti"]
    value = ti.xcom_pull(task_ids="resolve")
    if value is None:
        raise RunIncomplete("The run never started.", advice="The log of task 'resolve' says why.")
    published = ti.xcom_pull(task_ids="publish") is not None
    end_parent_run(RunInfo.model_validate(value), succeeded=published)
    if not published:
        raise RunIncomplete("No preferences were published.", advice="The log of task 'publish' says why.")
