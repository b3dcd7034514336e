"""The artifacts that a run is given instead of making them: models, and the data before its own.

Addresses are followed once, when the run starts: `models:/name@alias` may point elsewhere an hour later, and every
stage of the run must start from the same thing.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from operators.mlflow import MlflowRefusedError, MlflowServer, MlflowUnavailableError, ModelVersion
from stages.artifacts.addresses import split_artifact_uri
from stages.artifacts.manifests import read_manifest
from stages.config.errors import ConfigError, DamagedArtifactError, StageError, without_logins
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, REWARD_MODEL, Stage, kinds_of_start, trained_stages
from stages.config.mlflow import tracking_server
from stages.config.names import parse_model_address
from stages.config.nested import dotted_once
from stages.config.pipeline import PREVIOUS, PipelineConfig
from stages.config.places import check_source, is_gguf
from stages.config.preferences import PairsConfig, PairsHalf
from stages.config.request import ArtifactRef, Manifest

logger = logging.getLogger(__name__)

_CURATED, _TOKENS = GRAPH[Stage.CURATE].kind, GRAPH[Stage.TOKENIZE].kind


def given_artifacts(config: PipelineConfig) -> dict[str, ArtifactRef]:
    """Return the artifacts behind the given models and `previous_data`, by role.

    A model that is no artifact of ours (a Hugging Face folder, a hub id, a GGUF file) is left to the job, which sees
    it.
    """
    given: dict[str, ArtifactRef] = {}
    for role, address in config.given_models.items():
        if is_ours(address):
            model = given_artifact(address, field=role)
            _check_kind(role, address, model.kind)
            given[role] = model
    refuse_one_scorer(given.get(REWARD_MODEL), given.get(GOLD_MODEL), config.gold_model)
    if config.previous_data:
        given[PREVIOUS] = data_of(config.previous_data, kind=_CURATED, field="previous_data")
    return given


def refuse_one_scorer(reward: ArtifactRef | None, gold: ArtifactRef | None, address: str) -> None:
    """Raise ConfigError where the gold scorer at `address` is the reward model, whatever the two are called."""
    if reward and gold and reward.digest == gold.digest:
        raise ConfigError(
            f"gold_model={address!r} and the reward model at {reward.uri} have the same content {gold.digest[:12]}, "
            "and a scorer that a model learnt from cannot say whether it won",
            advice="Give another gold scorer, or leave gold_model empty.",
        )


def kept_apart_from_gold(config: PipelineConfig, overrides: Mapping[str, Any]) -> PipelineConfig:
    """Return a copy in which what a given gold scorer judges learns from the half of the pairs that the scorer did not
    learn from; an override of a stage's `half` stands."""
    gold = config.given.get(GOLD_MODEL)
    if gold is None:
        return config
    learnt = read_manifest(gold).config.get("half")
    other = {PairsHalf.FIRST.value: PairsHalf.SECOND, PairsHalf.SECOND.value: PairsHalf.FIRST}.get(str(learnt))
    if other is None:
        logger.warning(
            "%s learnt from both halves of its pairs. Models that learn from the same pairs will look better to it "
            "than they are.",
            gold.uri,
        )
        return config
    stated = {PipelineConfig.current_path(path) for path in dotted_once(overrides, "overrides")}
    for stage, spec in GRAPH.items():
        train = config.stage_config(stage) if stage in config.selected and spec.trains else None
        if isinstance(train, PairsConfig) and f"{stage.value}.half" not in stated:
            logger.info("%s learns from the %s half of the pairs, and gold_model from the other.", stage, other)
            config = config.model_copy(update={stage.value: train.model_copy(update={"half": other})})
    return config


def _check_kind(role: str, address: str, kind: str) -> None:
    scorers = [spec.kind for spec in trained_stages() if spec.scores]
    by_role = {BASE_MODEL: list(kinds_of_start()), REWARD_MODEL: scorers, GOLD_MODEL: scorers}
    allowed = by_role.get(role, [*kinds_of_start(), *scorers])
    advice = {
        BASE_MODEL: "Give a language model; a reward model cannot be one.",
        REWARD_MODEL: "Give a reward model; one is trained from a language model with reward_base.",
        GOLD_MODEL: "Give a gold scorer or a reward model that this run does not train with.",
    }.get(role, "Give a model.")
    if kind not in allowed:
        raise ConfigError(f"{role}={address!r} is of kind {kind!r}; allowed: {', '.join(allowed)}", advice=advice)


def is_ours(address: str) -> bool:
    """Whether an address names an artifact of an Athanor store; a file in one is none."""
    if is_gguf(address):
        return False
    return address.startswith("models:/") or (address.startswith(("file://", "s3://")) and "/artifacts/" in address)


def given_artifact(address: str, *, field: str) -> ArtifactRef:
    """Return the artifact at an address; raises ConfigError that names the field when there is none."""
    if not address.startswith("models:/"):
        check_source(address, field=field)
    if not is_ours(address):
        raise ConfigError(
            f"{field}={address!r} is not the address of an artifact",
            advice="Give <store>/artifacts/<kind>/<fingerprint>, models:/name@alias or models:/name/version.",
        )
    version = _registered(address, field=field) if address.startswith("models:/") else None
    uri = (version.tags["artifact.uri"] if version else address).rstrip("/")
    manifest = _manifest(uri, f"{field}={address!r}")
    if version and (registered := version.tags.get("lineage.digest", manifest.digest)) != manifest.digest:
        raise ConfigError(
            f"{field}={address!r} was registered with content {registered[:12]}, and {uri} has {manifest.digest[:12]}",
            advice="The artifact was replaced or built again. Register it anew, or give its own address.",
        )
    store, key = split_artifact_uri(uri)
    # Spelled as its store spells it, because the spelling decides whether it counts as an artifact of the run's own.
    return manifest.ref(f"{store.root_uri}/{key}")


def data_of(address: str, *, kind: str, field: str) -> ArtifactRef:
    """Return the `curated` or `tokens` artifact at an address, or the one that the artifact there was made from.

    Where an input lies is what a manifest says; it counts only if the content there is the one that was used.
    """
    what = f"{field}={address!r}"
    start = given_artifact(address, field=field)
    waiting, seen = [start], set[str]()
    replaced: list[str] = []
    while waiting:
        ref = waiting.pop(0)
        if ref.uri in seen:
            continue
        seen.add(ref.uri)
        try:
            manifest = _manifest(ref, what)
        except DamagedArtifactError as error:
            replaced.append(error.message)
            continue
        if manifest.kind == kind:
            return manifest.ref(ref.uri)
        # A run's own tokens stand among the inputs of each of its models; the models before it come later.
        nearest = sorted(manifest.inputs, key=lambda entry: (entry.kind != kind, entry.kind != _TOKENS))
        waiting += [entry.ref() for entry in nearest]
    if replaced:
        raise ConfigError(
            f"{what}: the {kind!r} artifact that it was made from is not what it was: {'; '.join(replaced)}",
            advice=f"Give the URI of a {kind!r} artifact.",
        )
    raise ConfigError(
        f"{what} ({start.kind}) was made from no {kind!r} artifact",
        advice=f"Give the URI of a {kind!r} artifact, or of a model that a whole run made.",
    )


def _registered(address: str, *, field: str) -> ModelVersion:
    """Return the version behind `models:/name@alias` or `models:/name/version`, with the tag `artifact.uri`.

    Raises ConfigError when there is no such version or Athanor did not register it, StageError when MLflow is away.
    """
    version = find_version(address)
    if version is None:
        raise ConfigError(
            f"{field}={address!r} is not registered in MLflow",
            advice="Use models:/<name>@<alias> or models:/<name>/<version> of a registered model that MLflow lets this "
            "account read.",
        )
    if not version.tags.get("artifact.uri"):
        raise ConfigError(
            f"{field}={address!r} has no tag artifact.uri: Athanor did not register it",
            advice="Name a model that Athanor registered, or the folder or URI of its weights.",
        )
    return version


def find_version(address: str) -> ModelVersion | None:
    """Return the registered version behind `models:/name@alias` or `models:/name/version`, None when there is none.

    Raises ConfigError without an MLflow server or when it refuses, StageError when it is away.
    """
    tracking_uri = tracking_server()
    if not tracking_uri:
        given = without_logins(os.environ.get("MLFLOW_TRACKING_URI", ""))
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={given!r} is not an HTTP address: {address!r} cannot be looked up",
            advice="Set MLFLOW_TRACKING_URI in Airflow's environment, such as http://127.0.0.1:5000.",
        )
    try:
        model = parse_model_address(address)
    except ValueError as error:
        raise ConfigError(str(error), advice="Correct the address.") from None
    try:
        with MlflowServer(tracking_uri) as server:
            return server.model_version(model.name, alias=model.alias, version=model.version)
    except MlflowRefusedError as error:
        raise ConfigError(f"{address!r} could not be looked up: {error}", advice="Then clear the task.") from None
    except MlflowUnavailableError as error:
        raise StageError(f"{address!r} could not be looked up: {error}", advice="The task is retried.") from None


def _manifest(ref: ArtifactRef | str, what: str) -> Manifest:
    try:
        return read_manifest(ref)
    except FileNotFoundError:
        uri = ref if isinstance(ref, str) else ref.uri
        raise ConfigError(
            f"{what}: there is no artifact at {uri!r}", advice="Check the address and that Airflow sees that store."
        ) from None
