"""The MLflow parent run of a pipeline run, over plain REST: opened by `resolve`, ended by the last task.

A stage ends its own child run. This module ends the child runs of jobs that were killed before they could.

An MLflow outage never stops a pipeline: it is a warning, and the first stage that reaches MLflow makes the parent.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from operators.links import mlflow_artifact_page
from stages.config import mlflow_limits as limits
from stages.config.errors import ConfigError, without_logins
from stages.config.mlflow import authorization, tracking_server
from stages.config.request import ArtifactRef, RunInfo
from stages.config.servers import is_web_address

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10.0
RUN_TAG = "athanor.run_id"
DRY_RUN_TAG = "athanor.dry_run"
_PLAN_TAG = "athanor.plan"
_STAGE_TAG = "lineage.stage"
"""Child runs have this tag, the parent run does not."""
_STAGE_ARTIFACT = "athanor.stage"
"""Followed by the stage; the tracker in the job writes the same tags for what it builds."""


class MlflowUnavailableError(Exception):
    """MLflow gave no usable answer."""


class MlflowRefusedError(MlflowUnavailableError):
    """MLflow answers and refuses, and will refuse again until a person has changed something."""


class MlflowForbiddenError(MlflowRefusedError):
    """The account lacks a permission, or what was asked for is not there: of some things MLflow tells no difference."""


def open_parent_run(run: RunInfo) -> str | None:
    """Find or create the parent run, set it RUNNING and return its id; None without an MLflow that answers.

    Raises ConfigError when the experiment was deleted: no stage of the run could write there, and `promote` would fail
    after everything was trained.
    """
    tracking_uri = tracking_server()
    if not tracking_uri:
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        logger.warning("MLFLOW_TRACKING_URI=%r is not an HTTP address: no MLflow parent run.", without_logins(given))
        return None
    try:
        with MlflowServer(tracking_uri) as server:
            return server.open_parent_run(run)
    except MlflowUnavailableError as error:
        logger.warning("No MLflow parent run yet: %s", error)
        return None


def end_parent_run(run: RunInfo, *, succeeded: bool) -> None:
    """Put the parent run into a terminal status; warns when MLflow is away."""
    tracking_uri = tracking_server()
    if not tracking_uri:
        return
    status = "FINISHED" if succeeded else "FAILED"
    try:
        with MlflowServer(tracking_uri) as server:
            run_id = run.parent_run_id or server.find_parent_run(run)
            if run_id is not None:
                server.update_run(run_id, status)
                logger.info("MLflow run %s: %s", run_id, status)
    except MlflowUnavailableError as error:
        logger.warning("The MLflow parent run was not ended as %s: %s", status, error)


def end_stage_runs(run: RunInfo, stage: str | None = None, *, killed: bool) -> None:
    """End the child runs that still say RUNNING although their job has ended: of one stage, or of all of them.

    A job that is killed by SIGKILL cannot do it itself; a retry sets its run RUNNING again. Warns when MLflow is away.
    """
    tracking_uri = tracking_server()
    if not tracking_uri:
        return
    status = "KILLED" if killed else "FAILED"
    try:
        with MlflowServer(tracking_uri) as server:
            for run_id in server.running_stage_runs(run, stage):
                server.update_run(run_id, status)
                logger.info("MLflow run %s was never ended; it is %s now.", run_id, status)
    except MlflowUnavailableError as error:
        logger.warning("MLflow runs of %s may still say RUNNING: %s", stage or run.run_id, error)


def note_artifact(run: RunInfo, stage: str, artifact: ArtifactRef, *, hit: bool) -> None:
    """Tag the parent run with an artifact that no stage run stands for: one that existed, or that Airflow made itself.

    So its lineage is complete. Warns when MLflow is away.
    """
    tracking_uri = tracking_server()
    if run.parent_run_id is None or not tracking_uri:
        return
    record = {
        "hit": hit,
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "mlflow_run_id": artifact.mlflow_run_id,
    }
    try:
        with MlflowServer(tracking_uri) as server:
            server.set_tag(run.parent_run_id, f"{_STAGE_ARTIFACT}.{stage}", json.dumps(record))
    except MlflowUnavailableError as error:
        logger.warning("The MLflow parent run does not record the artifact of %s: %s", stage, error)


def log_plan(run: RunInfo, *, page: str, data: str, summary: str, dry_run: bool) -> None:
    """Put the plan on the parent run: as files, its total as a tag, and the page of a dry run as its description.

    Warns when MLflow is away.
    """
    tracking_uri = tracking_server()
    if run.parent_run_id is None or not tracking_uri:
        return
    try:
        with MlflowServer(tracking_uri) as server:
            server.set_tag(run.parent_run_id, _PLAN_TAG, limits.shortened(summary, limits.TAG_VALUE))
            if dry_run:
                server.set_tag(run.parent_run_id, DRY_RUN_TAG, "true")
                server.set_tag(run.parent_run_id, "mlflow.note.content", limits.shortened(page, limits.DESCRIPTION))
            for name, text in (("plan.md", page), ("plan.json", data)):
                server.log_text(run.parent_run_id, name, text)
    except MlflowUnavailableError as error:
        logger.warning("The plan is not in MLflow: %s", error)


def parent_artifact_page(child_run_id: str, path: str) -> str | None:
    """Page of an artifact of the parent of a stage's run; None when MLflow is away.

    Looked up through the child run, because an artifact that existed already belongs to the pipeline run that built
    it and not to the current one.
    """
    tracking_uri = tracking_server()
    if not tracking_uri:
        return None
    try:
        with MlflowServer(tracking_uri) as server:
            experiment_id, parent_run_id = server.experiment_and_parent(child_run_id)
    except MlflowUnavailableError as error:
        logger.warning("No link to %s: %s", path, error)
        return None
    if parent_run_id is None:
        return None
    return mlflow_artifact_page(tracking_uri, parent_run_id, path, experiment_id)


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    name: str
    version: str
    model_id: str | None
    tags: dict[str, str]

    @property
    def address(self) -> str:
        """An address that stays the same when aliases move."""
        return f"models:/{self.name}/{self.version}"


class MlflowServer:
    """The few REST calls that Airflow's side needs; use it as a context manager."""

    def __init__(self, tracking_uri: str) -> None:
        import httpx

        # As `auth` and not as a header: httpx would put a login in the address itself over a header.
        login = _log_in if authorization() else None
        address = without_logins(tracking_uri)
        if not is_web_address(tracking_uri):
            raise MlflowRefusedError(f"MLFLOW_TRACKING_URI={address!r} is not an address; expected http://host:port")
        try:
            self._http = httpx.Client(base_url=tracking_uri.rstrip("/"), timeout=_TIMEOUT_SECONDS, auth=login)
        except httpx.InvalidURL as error:
            words = f"MLFLOW_TRACKING_URI={address!r} or an address in NO_PROXY is none: {error}"
            raise MlflowRefusedError(words) from None

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def open_parent_run(self, run: RunInfo) -> str:
        experiment_id = self._experiment(run.experiment)
        run_id = self._search(experiment_id, run)
        if run_id is not None:
            self.update_run(run_id, "RUNNING")
            return run_id
        tags = {
            RUN_TAG: run.run_id,
            "mlflow.runName": run.name,
            "airflow.dag_id": run.dag_id,
            "airflow.run_id": run.airflow_run_id,
            "airflow.url": run.airflow_url,
        }
        body = {
            "experiment_id": experiment_id,
            "run_name": limits.shortened(run.name, limits.RUN_NAME),
            "start_time": _now_ms(),
            "tags": [
                {"key": key, "value": limits.shortened(value, limits.TAG_VALUE)} for key, value in tags.items() if value
            ],
        }
        return self._call("POST", "runs/create", body)["run"]["info"]["run_id"]

    def find_parent_run(self, run: RunInfo) -> str | None:
        found = self._find_experiment(run.experiment)
        return None if found is None else self._search(found["experiment_id"], run)

    def running_stage_runs(self, run: RunInfo, stage: str | None) -> list[str]:
        """Return the child runs of this pipeline run, of one stage or of all, that still say RUNNING."""
        found = self._find_experiment(run.experiment)
        if found is None:
            return []
        body = {
            "experiment_ids": [found["experiment_id"]],
            "filter": f"tags.`{RUN_TAG}` = '{run.run_id}' and attributes.status = 'RUNNING'",
            "max_results": 100,
        }
        running = []
        for child in self._call("POST", "runs/search", body).get("runs", ()):
            tags = {tag["key"]: tag["value"] for tag in child["data"].get("tags", ())}
            if _STAGE_TAG in tags and stage in (None, tags[_STAGE_TAG]):
                running.append(child["info"]["run_id"])
        return running

    def experiment_and_parent(self, run_id: str) -> tuple[str, str | None]:
        """Return the experiment of a run and its parent run."""
        run = self._call("GET", "runs/get", {"run_id": run_id})["run"]
        tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", ())}
        return run["info"]["experiment_id"], tags.get("mlflow.parentRunId")

    def model_version(self, name: str, *, alias: str = "", version: str = "") -> "ModelVersion | None":
        """Return a registered version; None when there is none that the account may read."""
        if alias:
            query, path = {"name": name, "alias": alias}, "registered-models/alias"
        else:
            query, path = {"name": name, "version": version}, "model-versions/get"
        try:
            found = self._call("GET", path, query, absent_ok=True)
        except MlflowForbiddenError:
            # With logins, MLflow forbids to read a model that nobody has registered; the list has what may be read.
            if self._lists_model(name):
                raise
            found = None
        if found is None:
            return None
        entry = found["model_version"]
        tags = {tag["key"]: tag["value"] for tag in entry.get("tags", ())}
        return ModelVersion(name, str(entry.get("version", version)), entry.get("model_id") or None, tags)

    def _lists_model(self, name: str) -> bool:
        query = {"filter": f'name = "{name}"' if "'" in name else f"name = '{name}'", "max_results": 1}
        return bool(self._call("GET", "registered-models/search", query).get("registered_models"))

    def set_version_tag(self, version: "ModelVersion", key: str, value: str) -> None:
        body = {"name": version.name, "version": version.version, "key": key, "value": value}
        self._call("POST", "model-versions/set-tag", body)

    def set_alias(self, version: "ModelVersion", alias: str) -> None:
        """Point an alias of the registered model to this version."""
        body = {"name": version.name, "alias": alias, "version": version.version}
        self._call("POST", "registered-models/alias", body)

    def delete_alias(self, name: str, alias: str) -> None:
        self._call("DELETE", "registered-models/alias", {"name": name, "alias": alias}, absent_ok=True)

    def update_run(self, run_id: str, status: str) -> None:
        body: dict[str, Any] = {"run_id": run_id, "status": status}
        if status != "RUNNING":
            body["end_time"] = _now_ms()
        self._call("POST", "runs/update", body)

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._call("POST", "runs/set-tag", {"run_id": run_id, "key": key, "value": value})

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Store a small file with a run, through the tracking server's own artifact service."""
        root = urlsplit(self._call("GET", "runs/get", {"run_id": run_id})["run"]["info"]["artifact_uri"])
        if root.scheme != "mlflow-artifacts":
            raise MlflowUnavailableError(f"this server does not serve artifacts itself; they are in {root.scheme}://")
        where = f"/api/2.0/mlflow-artifacts/artifacts{root.path}/{name}"
        try:
            answer = self._http.put(where, content=text.encode())
        except _no_answer() as error:
            raise _no_use(name, error) from None
        if answer.status_code >= 400:
            raise _refused(name, answer.status_code, answer.text)

    def _find_experiment(self, name: str) -> dict[str, Any] | None:
        query = {"experiment_name": limits.shortened(name, limits.EXPERIMENT_NAME)}
        found = self._call("GET", "experiments/get-by-name", query, absent_ok=True)
        return None if found is None else found["experiment"]

    def _experiment(self, name: str) -> str:
        experiment = self._find_experiment(name)
        if experiment is None:
            body = {"name": limits.shortened(name, limits.EXPERIMENT_NAME)}
            created = self._call("POST", "experiments/create", body, exists_ok=True)
            if created is not None:
                return created["experiment_id"]
            experiment = self._find_experiment(name)
        if experiment is None:
            raise MlflowUnavailableError(f"MLflow's experiment {name!r} exists and cannot be found")
        if experiment.get("lifecycle_stage") == "deleted":
            number = experiment["experiment_id"]
            raise ConfigError(
                f"MLflow's experiment {name!r} (id {number}) was deleted",
                advice=f"Restore it (`mlflow experiments restore --experiment-id {number}`) or name another one.",
            )
        return experiment["experiment_id"]

    def _search(self, experiment_id: str, run: RunInfo) -> str | None:
        body = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`{RUN_TAG}` = '{run.run_id}'",
            "max_results": 100,
        }
        for found in self._call("POST", "runs/search", body).get("runs", ()):
            tags = {tag["key"]: tag["value"] for tag in found["data"].get("tags", ())}
            # Before folders had names of their own, runs of other DAGs and with similar ids shared RUN_TAG.
            known = {"airflow.dag_id": run.dag_id, "airflow.run_id": run.airflow_run_id}
            agree = all(tags.get(key, value) == value for key, value in known.items() if value)
            if _STAGE_TAG not in tags and agree:
                return found["info"]["run_id"]
        return None

    def _call(
        self, method: str, path: str, values: Mapping[str, Any], *, absent_ok: bool = False, exists_ok: bool = False
    ) -> Any:
        where = f"/api/2.0/mlflow/{path}"
        try:
            if method == "GET":
                answer = self._http.get(where, params=dict(values))
            else:
                answer = self._http.request(method, where, json=dict(values))
        except _no_answer() as error:
            raise _no_use(path, error) from None
        if absent_ok and (answer.status_code == 404 or _says_absent(answer.text)):
            return None
        if exists_ok and "RESOURCE_ALREADY_EXISTS" in answer.text:
            return None
        if answer.status_code >= 400:
            raise _refused(path, answer.status_code, answer.text)
        try:
            found = json.loads(answer.text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise MlflowRefusedError(f"MLflow {path}: {answer.url.host} answers, but is not an MLflow server")
        return found


def _no_answer() -> tuple[type[Exception], ...]:
    """What httpx raises when there is no answer; an address that is none is not among its own errors."""
    import httpx

    return (httpx.HTTPError, httpx.InvalidURL)


def _no_use(what: str, error: Exception) -> MlflowUnavailableError:
    """Say why there was no answer: a certificate needs a person, all else may pass."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return MlflowRefusedError(
            f"MLflow {what}: its certificate is not accepted; set SSL_CERT_FILE to the file of its authority ({error})"
        )
    return MlflowUnavailableError(f"MLflow {what}: {type(error).__name__}: {error}")


def _refused(path: str, status: int, text: str) -> MlflowUnavailableError:
    """Say what an error's status means: an outage is retried elsewhere, the others need a person."""
    if status == 401:
        return MlflowRefusedError(
            f"MLflow {path}: the login is not accepted (HTTP 401); correct MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in Airflow's environment"
        )
    if status == 403 and "host header" in text.lower():
        return MlflowRefusedError(
            f"MLflow {path}: the server does not accept this host name (HTTP 403); add it to its MLFLOW_HOSTS"
        )
    if status == 403:
        return MlflowForbiddenError(f"MLflow {path}: the account may not do this (HTTP 403); give it the permission")
    if status < 500 and status not in (408, 429):
        return MlflowRefusedError(f"MLflow {path}: HTTP {status}: {text[:300]}")
    return MlflowUnavailableError(f"MLflow {path}: HTTP {status}: {text[:300]}")


def _says_absent(text: str) -> bool:
    """MLflow answers an unknown alias with HTTP 400."""
    return "RESOURCE_DOES_NOT_EXIST" in text or "Registered model alias" in text


def _log_in(request: "httpx.Request") -> "httpx.Request":
    request.headers["Authorization"] = authorization()
    return request


def _now_ms() -> int:
    return int(time.time() * 1000)
