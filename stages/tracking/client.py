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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.errors import ConfigError, StageError, without_logins
from stages.config.request import Manifest
from stages.lineage.tags import lineage_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MLFLOW_RUN_MARKER = "ATHANOR_MLFLOW_RUN"
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE"})
"""MLflow error codes for which a retry cannot help; others may: an outage, an expired token, a full disk."""
_ABSENT = REFUSALS | {"RESOURCE_DOES_NOT_EXIST"}
_TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
_DIGEST_LENGTH = 32  # MLflow's column holds 36 characters
_SOURCE_TYPES = {"s3": "s3", "file": "local", "hf": "hugging_face", "http": "http", "https": "http"}
_VALUE_LENGTH = 5000  # below MLflow's limits for params (6000) and tags (8000)


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
    """Return the experiment's id, and mark it as model training so that MLflow shows runs and charts."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, tags=_TRAINING_VIEW)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
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
        return client.get_run(run_id).info.run_id
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
        name=name,
        digest=short_digest(digest),
        source_type=_SOURCE_TYPES.get(scheme, "external"),
        source=json.dumps({"uri": uri}),
    )
    tags = {"mlflow.data.context": context, "digest.sha256": digest, "artifact.uri": uri}
    return DatasetInput(dataset, [InputTag(key, value) for key, value in tags.items()])


def short_digest(digest: str) -> str:
    """The part of a digest that fits MLflow's column."""
    return digest.removeprefix("sha256:")[:_DIGEST_LENGTH]


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


def metric_key(key: str) -> str:
    """Replace what MLflow refuses in metric keys; some keys contain kinds of preference pairs, which users name."""
    return re.sub(r"[^A-Za-z0-9_\-. /:]", "-", key)


def model_name(run_name: str, role: str) -> str:
    """LoggedModel names allow fewer characters than run names."""
    return f"{run_name.replace('.', '-')}-{role}"


def artifact_uri_of_model(uri: str) -> str:
    """Return where the weights of `models:/name@alias` or `models:/name/version` lie in the artifact store.

    Raises ConfigError when there is no such model or Athanor did not register it, StageError when MLflow is away.
    """
    from mlflow.exceptions import MlflowException

    client = connect()
    name = uri.removeprefix("models:/")
    try:
        if "@" in name:
            version = client.get_model_version_by_alias(*name.split("@", 1))
        else:
            version = client.get_model_version(*name.rsplit("/", 1))
    except (MlflowException, TypeError) as error:
        advice = "Use models:/<name>@<alias> or models:/<name>/<version> of a registered model."
        if isinstance(error, MlflowException) and error.error_code not in _ABSENT:
            raise StageError(f"{uri!r} could not be looked up in MLflow: {explain(error)}", advice="") from error
        raise ConfigError(f"{uri!r} is not registered in MLflow: {error}", advice=advice) from error
    if not (artifact := version.tags.get("artifact.uri")):
        raise ConfigError(
            f"{uri!r} has no tag artifact.uri: Athanor did not register it",
            advice="Name a model that Athanor registered, or the folder or URI of its weights.",
        )
    return artifact


def registered_versions(fingerprints: Iterable[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (name, version, aliases) of every registered version of these artifacts."""
    client = connect()
    found = []
    for fingerprint in fingerprints:
        for version in client.search_model_versions(tag_filter({"lineage.fingerprint": fingerprint})):
            aliases = client.get_model_version(version.name, version.version).aliases
            found.append((version.name, str(version.version), tuple(aliases)))
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
            raise StageError(f"registered models could not be listed: {explain(error)}", advice=advice) from error
        for version in page:
            uri = version.tags.get("artifact.uri", "")
            found |= {version.tags.get("lineage.fingerprint", ""), uri.rstrip("/").rsplit("/", 1)[-1]} - {""}
        if not (token := page.token):
            return found


def explain(error: Exception) -> str:
    """Return a short reason for a failed call; mlflow's own message of a refused connection fills half a screen."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError):  # the exceptions of requests are OSErrors
        return f"{without_logins(os.environ.get('MLFLOW_TRACKING_URI', ''))} does not answer ({type(cause).__name__})"
    return without_logins(str(error))[:300]


def now_ms() -> int:
    return int(time.time() * 1000)


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Leave out empty tags, which MLflow would show as facts."""
    return {key: cut(value) for key, value in tags.items() if value}


def cut(value: str) -> str:
    """Shorten a param or tag to the length that every version of MLflow accepts."""
    return value[:_VALUE_LENGTH]


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
