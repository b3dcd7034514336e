"""The DAG `rollback`: the champion is taken back, and the model that was champion before it is champion again.

Nothing is deleted and nothing is built: two aliases move in MLflow. The record, who took back what, when and why, is
written to the store before they do, and stands on both versions afterwards.
"""

import logging
from datetime import UTC, datetime
from typing import Any

from operators.mlflow import MlflowRefusedError, MlflowServer, MlflowUnavailableError, ModelVersion
from stages.artifacts.addresses import open_default_store
from stages.artifacts.manifests import read_manifest
from stages.artifacts.store import Store, write_json
from stages.config import mlflow_limits as limits
from stages.config.decision import CHAMPION, PREVIOUS, ROLLED_BACK
from stages.config.errors import ConfigError, DamagedArtifactError, StageError
from stages.config.forms import RollbackParams
from stages.config.graph import aligned_models, registered_name
from stages.config.mlflow import tracking_server

logger = logging.getLogger(__name__)

_TAKEN_FROM = "rollback.from"
"""Tag of the version that is champion again: which one it was taken from."""


def roll_back(params: RollbackParams, *, by: str) -> dict[str, Any]:
    """Make `previous` champion again and return the record of it.

    Raises ConfigError when there is no champion or no previous one, or when the previous one cannot be read; StageError
    while MLflow is away. A repetition after an outage completes what was begun.
    """
    name = registered_name(params.run_name, aligned_models()[0])
    try:
        with MlflowServer(_server()) as server:
            return _move(server, open_default_store(), name, params, by=by)
    except MlflowRefusedError as error:
        raise ConfigError(f"{name} was not rolled back: {error}", advice="Then clear the task.") from None
    except MlflowUnavailableError as error:
        raise StageError(f"{name} was not rolled back: {error}", advice="The task is retried.") from None


def _server() -> str:
    if tracking_uri := tracking_server():
        return tracking_uri
    raise ConfigError(
        "MLFLOW_TRACKING_URI is not an HTTP address: there is no registry to roll back in",
        advice="Set MLFLOW_TRACKING_URI in Airflow's environment, such as http://127.0.0.1:5000.",
    )


def _move(server: MlflowServer, store: Store, name: str, params: RollbackParams, *, by: str) -> dict[str, Any]:
    champion = server.model_version(name, alias=CHAMPION)
    previous = server.model_version(name, alias=PREVIOUS)
    if champion is None:
        raise ConfigError(
            f"run_name={params.run_name!r}: {name} has no champion, so there is nothing to take back",
            advice="Check the run name; MLflow lists the registered models.",
        )
    if previous and previous.version == champion.version and (begun := champion.tags.get(_TAKEN_FROM)):
        # An earlier attempt was cut off before its last call.
        server.delete_alias(name, PREVIOUS)
        return {"model": name, "from_version": begun, "to_version": champion.version}
    if previous is None or previous.version == champion.version:
        raise ConfigError(
            f"run_name={params.run_name!r}: {name} has no previous champion that version {champion.version} could give "
            "way to",
            advice=f"Choose a version yourself and set its alias {CHAMPION!r} in MLflow, or delete the alias: then the "
            "next run competes with no champion.",
        )
    _refuse_unreadable(previous)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "model": name,
        "from_version": champion.version,
        "from_fingerprint": champion.tags.get("lineage.fingerprint", ""),
        "to_version": previous.version,
        "to_fingerprint": previous.tags.get("lineage.fingerprint", ""),
        "reason": params.reason,
        "by": by,
        "at": at,
    }
    write_json(store, f"rollbacks/{name}/{at.replace(':', '-')}.json", record)
    tags = {ROLLED_BACK: params.reason, "rollback.by": by, "rollback.at": at, "rollback.to": previous.version}
    for key, value in tags.items():
        server.set_version_tag(champion, key, limits.shortened(value, limits.TAG_VALUE))
    server.set_version_tag(previous, _TAKEN_FROM, champion.version)
    # In this order, a crash in between leaves a champion, and the repetition finds the same two versions.
    server.set_alias(previous, CHAMPION)
    server.delete_alias(name, PREVIOUS)
    logger.info("%s: version %s is champion again, %s was taken back.", name, previous.version, champion.version)
    return record


def _refuse_unreadable(previous: ModelVersion) -> None:
    """A champion whose model is gone would be worse than the one that is taken back."""
    uri = previous.tags.get("artifact.uri", "")
    try:
        manifest = read_manifest(uri) if uri else None
    except (FileNotFoundError, DamagedArtifactError) as error:
        raise _unreadable(previous, f"its artifact {uri} cannot be read: {error}") from None
    registered = previous.tags.get("lineage.digest", "")
    if manifest is None or registered not in ("", manifest.digest):
        why = f"{uri} has other content than was registered" if manifest else "it has no tag artifact.uri"
        raise _unreadable(previous, why)


def _unreadable(previous: ModelVersion, why: str) -> ConfigError:
    return ConfigError(
        f"{previous.address}, the previous champion, cannot become champion again: {why}",
        advice=f"Bring the artifact back from a backup, or set the alias {CHAMPION!r} in MLflow to another version.",
    )
