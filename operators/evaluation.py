"""The DAG `evaluate_model`: the stage `evaluate` on one model outside the run that made it."""

import logging
from typing import Any

from operators.failures import as_stage_failures
from operators.form import form_values
from operators.given import data_of, find_version, given_artifact, given_artifacts, is_ours, refuse_one_scorer
from operators.mlflow import MlflowRefusedError, MlflowServer, MlflowUnavailableError
from operators.run import finish_run, open_run
from stages.artifacts.manifests import read_file, read_manifest, settings_digest
from stages.config import mlflow_limits as limits
from stages.config.errors import ConfigError, StageError
from stages.config.evaluation import Evaluation
from stages.config.forms import EvaluationParams
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, Stage, spec_of_kind, trained_stages
from stages.config.mlflow import tracking_server
from stages.config.pipeline import PipelineConfig
from stages.config.places import is_gguf
from stages.config.records import parse_object
from stages.config.request import ArtifactRef
from stages.config.resolve import resolve
from stages.config.validation import validated

logger = logging.getLogger(__name__)


def start_evaluation(context: Any) -> dict[str, Any]:
    """Look up model, data and judge, store the configuration, open the MLflow run; return the RunInfo as JSON."""
    with as_stage_failures():
        params = validated(EvaluationParams, form_values(context["params"]))
        config = evaluation_config(params)
    return open_run(context, config, params.model_dump(mode="json"))


def evaluation_config(params: EvaluationParams) -> PipelineConfig:
    """Return a configuration that runs `evaluate` alone.

    An aligned model comes with the model that it was made from, the reference of its win rate and its KL.
    """
    if is_gguf(params.model):
        raise ConfigError(
            f"model={params.model!r} is a GGUF file, which a run must convert first",
            advice="Use llm_pipeline with it as base_model and first_stage=evaluate.",
        )
    chosen = {"recipe": params.recipe, "benchmarks": params.benchmarks, "overrides": params.overrides}
    judges = {"gold_model": params.gold_model, "judge": params.judge}
    config = resolve({"run_name": "evaluation", **chosen, **judges})
    given: dict[str, ArtifactRef] = {}
    if is_ours(params.model):
        given = _family(given_artifact(params.model, field="model"))
    elif not params.data:
        raise ConfigError(
            f"model={params.model!r} has no run of its own to take data from, and data is empty",
            advice="Give data: the URI of a `tokens` artifact made with that model as base_model.",
        )
    given["tokens"] = data_of(params.data or params.model, kind=GRAPH[Stage.TOKENIZE].kind, field="data")
    if params.reward:
        given["reward"] = given_artifact(params.reward, field="reward")
        if given["reward"].kind != GRAPH[Stage.REWARD].kind:
            raise ConfigError(
                f"reward={params.reward!r} is of kind {given['reward'].kind!r}; allowed: {GRAPH[Stage.REWARD].kind}",
                advice="Give a reward model, or leave it empty.",
            )
    found = given_artifacts(config)  # a Hugging Face folder or a hub id is left to the job, which sees it
    given |= {role: found[role] for role in judges if role in found}
    refuse_one_scorer(given.get("reward"), given.get(GOLD_MODEL), params.gold_model)
    base_model = "" if is_ours(params.model) else params.model
    return config.model_copy(update={"only": Stage.EVALUATE, "given": given, "base_model": base_model})


def _family(model: ArtifactRef) -> dict[str, ArtifactRef]:
    """By role: a model, and for an aligned one the model and the reward model that it was made from, whether its run
    made them or was given them."""
    spec = spec_of_kind(model.kind)
    if spec is None or not spec.trains or spec.scores:
        allowed = ", ".join(spec.kind for spec in trained_stages() if not spec.scores)
        raise ConfigError(
            f"model={model.uri!r} is of kind {model.kind!r}; allowed: {allowed}", advice="Give a language model."
        )
    family = {spec.role: model}
    if spec.aligned:
        wanted = {GRAPH[stage].kind: GRAPH[stage].role for stage in (Stage.SFT, Stage.REWARD)}
        for entry in read_manifest(model).inputs:
            if entry.kind in wanted:
                family[wanted[entry.kind]] = entry.ref()
            elif entry.role == BASE_MODEL:
                family[BASE_MODEL] = entry.ref()
    return family


def conclude(context: Any, evaluation: dict[str, Any] | None) -> None:
    """Write the numbers on the registered version and end the MLflow run."""
    if evaluation is not None:
        with as_stage_failures():
            params = validated(EvaluationParams, form_values(context["params"]))
            if params.model.startswith("models:/"):
                tag_version(params.model, ArtifactRef.model_validate(evaluation))
    finish_run(context)


def tag_version(address: str, evaluation: ArtifactRef) -> None:
    """Put the evaluation on the version that was measured: its numbers, how it was made and where it lies."""
    manifest = read_manifest(evaluation)
    report = parse_object(read_file(evaluation, "metrics.json"), f"{evaluation.uri}/metrics.json")
    version = find_version(address)
    tags = version.tags if version else {}
    measured = [entry for entry in manifest.inputs if entry.fingerprint == tags.get("lineage.fingerprint")]
    role = next((entry.role for entry in measured if entry.digest == tags.get("lineage.digest", entry.digest)), None)
    if version is None or role is None:
        raise ConfigError(
            f"model={address!r} is no longer the model that was evaluated", advice="Name a version instead of an alias."
        )
    measured_now = Evaluation.from_report(report, settings_digest=settings_digest(manifest), uri=evaluation.uri)
    numbers = measured_now.of(role)
    tags = measured_now.conditions.tags() | {limits.key(key): repr(value) for key, value in numbers.items()}
    try:
        with MlflowServer(tracking_server()) as server:
            for name, value in tags.items():
                server.set_version_tag(version, name, limits.shortened(value, limits.TAG_VALUE))
    except MlflowRefusedError as error:
        raise ConfigError(f"{address!r} was not tagged: {error}", advice="Then clear the task.") from None
    except MlflowUnavailableError as error:
        raise StageError(f"{address!r} was not tagged: {error}", advice="The task is retried.") from None
    logger.info("%s: %s", version.address, numbers)
