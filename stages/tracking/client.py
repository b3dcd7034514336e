"""How Athanor uses MLflow: a client that fails fast, and look-ups by tag so that nothing is made twice.

Surprising on purpose:
- Importing mlflow takes seconds, so it happens inside functions, and only in this package.
- Only MlflowClient with explicit ids is used. mlflow's fluent functions would make a model an input of its own run.
- Weights stay in the artifact store; a LoggedModel points there by its tag `artifact.uri`.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import mlflow_limits as limits
from stages.config.errors import ConfigError
from stages.config.names import parse_model_address
from stages.config.request import Manifest
from stages.lineage.tags import lineage_tags
from stages.tracking.trouble import ABSENT, as_stage_error, deleted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MLFLOW_RUN_MARKER = "ATHANOR_MLFLOW_RUN"
_TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
_SOURCE_TYPES = {"s3": "s3", "file": "local", "hf": "hugging_face", "http": "http", "https": "http"}


def connect() -> "MlflowClient":
    """Import mlflow and return a client that gives up on a dead server within seconds; the caller retries.

    Raises ConfigError when MLFLOW_TRACKING_URI is not set: mlflow would then make a database in the current folder.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "MLFLOW_TRACKING_URI is not set; expected the URL of an MLflow server",
            advice="Set MLFLOW_TRACKING_URI in the environment of the Ray cluster, such as http://127.0.0.1:5000.",
        )
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient()


def stage_tag(stage: str) -> str:
    """Tag of the parent run that records whether a stage was built or hit, and where its artifact is."""
    return f"athanor.stage.{stage}"


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return MLflow's search filter for runs, models or versions with these tags."""
    return " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items())


def find_or_create_experiment(client: "MlflowClient", name: str) -> str:
    """Return the experiment's id, and mark it as model training so that MLflow shows runs and charts.

    Raises ConfigError when the experiment was deleted: MLflow keeps the name and refuses every new run.
    """
    from mlflow.exceptions import MlflowException

    name = limits.shortened(name, limits.EXPERIMENT_NAME)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, tags=_TRAINING_VIEW)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if found.lifecycle_stage == "deleted":
        problem, _, way_out = deleted("experiment", found.experiment_id, label=name).partition("; ")
        raise ConfigError(problem, advice=f"{way_out[0].upper()}{way_out[1:]}.")
    for key, value in _TRAINING_VIEW.items():
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id


def find_model(
    client: "MlflowClient", experiment_id: str, fingerprint: str, *, source_run_id: str | None = None
) -> "LoggedModel | None":
    """Return the LoggedModel of an artifact: ready ones first, then the newest."""
    found = [
        model
        for model in client.search_logged_models([experiment_id], tag_filter({"lineage.fingerprint": fingerprint}))
        if source_run_id is None or model.source_run_id == source_run_id
    ]
    return max(found, key=lambda model: (str(model.status) == "READY", model.creation_timestamp), default=None)


def find_or_create_model(
    client: "MlflowClient", experiment_id: str, manifest: Manifest, uri: str, run_name: str
) -> "LoggedModel":
    """Return the READY LoggedModel of a published artifact.

    It is made here when the artifact was built while MLflow was down, or when this MLflow is younger than the store.
    """
    model = find_model(client, experiment_id, manifest.fingerprint)
    if model is None:
        model = client.create_logged_model(
            experiment_id,
            name=model_name(run_name, manifest.stage.value),
            source_run_id=_existing_run(client, manifest.mlflow_run_id),
            tags={**clean_tags(lineage_tags(manifest, uri)), "mlflow.model.isExternal": "true"},
            model_type=manifest.stage.value,
        )
    if str(model.status) != "READY":
        client.set_logged_model_tags(model.model_id, clean_tags(lineage_tags(manifest, uri)))
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _existing_run(client: "MlflowClient", run_id: str | None) -> str | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        info = client.get_run(run_id).info
        return info.run_id if info.lifecycle_stage == "active" else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def dataset_input(name: str, uri: str, digest: str, *, context: str) -> Any:
    """Describe input data by name, address and digest. MLflow's digest column is short; the tag has the whole digest.

    The entity is built directly: mlflow.data would take a name such as `installed-docs` for a file.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = uri.partition("://")[0] if "://" in uri else ""
    dataset = Dataset(
        name=limits.shortened(name, limits.DATASET_NAME),
        digest=short_digest(digest),
        source_type=_SOURCE_TYPES.get(scheme, "external"),
        # A longer address would no longer be JSON if the whole text were cut; \uXXXX takes six characters.
        source=json.dumps({"uri": limits.shortened(uri, limits.DATASET_SOURCE // 6 - 10)}),
    )
    tags = {"mlflow.data.context": context, "digest.sha256": digest, "artifact.uri": uri}
    return DatasetInput(
        dataset, [InputTag(key, limits.shortened(value, limits.INPUT_TAG_VALUE)) for key, value in tags.items()]
    )


def short_digest(digest: str) -> str:
    """The part of a digest that fits MLflow's column."""
    return digest.removeprefix("sha256:")[: limits.DATASET_DIGEST]


def log_file(client: "MlflowClient", run_id: str, path: Path, name: str) -> None:
    """Store `path` as artifact `name`; the client can only keep a file's own name, so another name costs a copy."""
    folder, _, leaf = name.rpartition("/")
    if path.name == leaf:
        client.log_artifact(run_id, str(path), folder or None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        renamed = Path(scratch) / leaf
        shutil.copyfile(path, renamed)
        client.log_artifact(run_id, str(renamed), folder or None)


def model_name(run_name: str, role: str) -> str:
    """LoggedModel names allow fewer characters than run names."""
    return limits.shortened(f"{re.sub(r'[^A-Za-z0-9_-]', '-', run_name)}-{role}", limits.KEY)


@dataclass(frozen=True)
class RegisteredArtifact:
    """Where a registered version's weights lie, and the content that was registered."""

    uri: str
    digest: str
    """Empty for versions that an early release registered."""


def artifact_uri_of_model(uri: str) -> str:
    """Return where the weights of `models:/name@alias` or `models:/name/version` lie in the artifact store.

    Raises ConfigError when there is no such model or Athanor did not register it, StageError when MLflow is away.
    """
    return registered_artifact(uri).uri


def registered_artifact(uri: str) -> RegisteredArtifact:
    """The same with the digest of what was registered, for readers who must get exactly that."""
    from mlflow.exceptions import MlflowException

    advice = "Use models:/<name>@<alias> or models:/<name>/<version> of a registered model."
    try:
        model = parse_model_address(uri)
    except ValueError as error:
        raise ConfigError(str(error), advice=advice) from None
    client = connect()
    try:
        if model.alias:
            version = client.get_model_version_by_alias(model.name, model.alias)
        else:
            version = client.get_model_version(model.name, model.version)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise as_stage_error(error, f"{uri!r} could not be looked up in MLflow") from error
        raise ConfigError(f"{uri!r} is not registered in MLflow: {error}", advice=advice) from error
    if not (artifact := version.tags.get("artifact.uri")):
        raise ConfigError(
            f"{uri!r} has no tag artifact.uri: Athanor did not register it",
            advice="Name a model that Athanor registered, or the folder or URI of its weights.",
        )
    return RegisteredArtifact(artifact, version.tags.get("lineage.digest", ""))


def registered_versions(fingerprints: Iterable[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (name, version, aliases) of every registered version of these artifacts; StageError when MLflow does not
    answer."""
    from mlflow.exceptions import MlflowException

    client = connect()
    found = []
    try:
        for fingerprint in fingerprints:
            for version in client.search_model_versions(tag_filter({"lineage.fingerprint": fingerprint})):
                aliases = client.get_model_version(version.name, version.version).aliases
                found.append((version.name, str(version.version), tuple(aliases)))
    except MlflowException as error:
        raise as_stage_error(error, "registered versions could not be listed") from error
    return sorted(found)


def all_registered() -> set[str]:
    """Return the fingerprints of all model versions that Athanor registered; StageError when MLflow does not answer."""
    from mlflow.exceptions import MlflowException

    client, found, token = connect(), set[str](), None
    while True:
        try:
            page = client.search_model_versions(max_results=500, page_token=token)
        except MlflowException as error:
            advice = "Start MLflow and set MLFLOW_TRACKING_URI: only it knows which models are registered."
            raise as_stage_error(error, "registered models could not be listed", advice=advice) from error
        for version in page:
            uri = version.tags.get("artifact.uri", "")
            found |= {version.tags.get("lineage.fingerprint", ""), uri.rstrip("/").rsplit("/", 1)[-1]} - {""}
        if not (token := page.token):
            return found


def now_ms() -> int:
    return int(time.time() * 1000)


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Make tags fit, and leave out empty ones, which MLflow would show as facts."""
    return {limits.key(key): limits.shortened(value, limits.TAG_VALUE) for key, value in tags.items() if value}


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
