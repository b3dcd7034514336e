"""The registered models of a run in MLflow: `<run name>-base, -sft, -reward, -aligned`, their tags and their aliases.

Every step looks before it makes, so that a promotion that broke off can be repeated. Unlike tracking, registration is
not delivered later: an outage is a failure, and Airflow retries.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from stages.artifacts.manifests import read_manifest
from stages.config import mlflow_limits as limits
from stages.config.closing import Approval
from stages.config.decision import CHAMPION, ROLLED_BACK, Champion, Decision
from stages.config.evaluation import Evaluation
from stages.config.graph import registered_name, spec_of_role
from stages.config.request import ArtifactRef, Manifest
from stages.lineage.graph import started_from
from stages.lineage.tags import lineage_tags
from stages.tracking.client import (
    clean_tags,
    connect,
    dataset_input,
    find_or_create_experiment,
    find_or_create_model,
    short_digest,
    tag_filter,
)
from stages.tracking.trouble import as_stage_error

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


MADE_BY = "made by Athanor"
"""Words of every description that `promote` writes."""


@dataclass(frozen=True)
class Registered:
    """One model of the run in the registry."""

    role: str
    name: str
    version: str
    model_id: str
    fingerprint: str
    is_new: bool
    rolled_back: str = ""
    """Why it was taken back when it was champion; empty when it was not."""


class Registry:
    """Registers the models of one run, and moves aliases."""

    def __init__(self, run_name: str, experiment: str, approval: Approval | None = None) -> None:
        self._run_name = run_name
        self._approval = approval
        self._client: MlflowClient = connect()
        self._experiment_id = find_or_create_experiment(self._client, experiment)

    def register(self, role: str, ref: ArtifactRef, evaluation: Evaluation) -> Registered:
        """Return the version of this artifact, made now unless it exists; evaluation tags become the latest."""
        name = registered_name(self._run_name, spec_of_role(role))
        manifest = read_manifest(ref)
        model = find_or_create_model(self._client, self._experiment_id, manifest, ref.uri, self._run_name)
        tags = clean_tags(self._version_tags(role, manifest, ref, evaluation))
        version = self._find_version(name, manifest.fingerprint)
        is_new = version is None
        if version is None:
            self._ensure_registered_model(name)
            version = self._client.create_model_version(
                name,
                source=f"models:/{model.model_id}",
                run_id=model.source_run_id,
                tags=tags,
                model_id=model.model_id,
                await_creation_for=0,
            )
        else:
            self._update_tags(version, tags)
        return Registered(
            role=role,
            name=name,
            version=str(version.version),
            model_id=model.model_id,
            fingerprint=manifest.fingerprint,
            is_new=is_new,
            rolled_back=(version.tags or {}).get(ROLLED_BACK, ""),
        )

    def _update_tags(self, version: "ModelVersion", tags: dict[str, str]) -> None:
        # A new decision replaces the old one whole: an answer without a comment does not keep the earlier comment.
        for key in version.tags.keys() - tags.keys():
            if self._approval and key.startswith("approval."):
                self._client.delete_model_version_tag(version.name, version.version, key)
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._client.set_model_version_tag(version.name, version.version, key, value)

    def record_decision(self, model: Registered, decision: Decision) -> None:
        """Put what was decided about a model, and the numbers, on its version; the last decision counts."""
        tags = {"promoted": str(decision.promoted).lower(), "by": decision.comparison, "reason": decision.reason}
        if (ruling := decision.ruling) and ruling.primary and (found := ruling.primary.compared):
            tags |= {"suite": found.suite, "against": found.against, "level": f"{ruling.level:g}"}
            numbers = ("difference", "low", "high", "p", "items", "missing", "needed_items")
            tags |= {name: "" if (value := getattr(found, name)) is None else repr(value) for name in numbers}
        version = self._client.get_model_version(model.name, model.version)
        written = clean_tags({f"decision.{name}": value for name, value in tags.items()})
        # A person who promotes what was rolled back has taken that back; its record stays in the store.
        stale = ("decision.", "rollback.") if decision.promoted else ("decision.",)
        for key in version.tags.keys() - written.keys():
            if key.startswith(stale):
                self._client.delete_model_version_tag(model.name, model.version, key)
        for key, value in written.items():
            self._client.set_model_version_tag(model.name, model.version, key, value)

    def _version_tags(self, role: str, manifest: Manifest, ref: ArtifactRef, evaluation: Evaluation) -> dict[str, str]:
        tags = {**lineage_tags(manifest, ref.uri), **self._airflow_tags(manifest), **evaluation.conditions.tags()}
        tags |= {key: repr(value) for key, value in evaluation.of(role).items()}
        if spec_of_role(role).aligned:
            tags["alignment"] = role
        if self._approval:
            tags |= {f"approval.{name}": value for name, value in self._approval.model_dump(mode="json").items()}
        if ancestor := started_from(manifest):
            tags["lineage.started_from"] = ancestor
        return tags

    def _airflow_tags(self, manifest: Manifest) -> dict[str, str]:
        """Who built the artifact is on the run that built it; a hit is promoted by another run."""
        from mlflow.exceptions import MlflowException

        if manifest.mlflow_run_id is None:
            return {}
        try:
            tags = self._client.get_run(manifest.mlflow_run_id).data.tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}  # this MLflow is younger than the artifact
        return {key: value for key, value in tags.items() if key.startswith("airflow.")}

    def _find_version(self, name: str, fingerprint: str) -> "ModelVersion | None":
        query = f"name = '{name}' and {tag_filter({'lineage.fingerprint': fingerprint})}"
        found = self._client.search_model_versions(query)
        return min(found, key=lambda version: int(version.version), default=None)

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def champion(self, name: str) -> Champion | None:
        """Return the current champion, None when no version has the alias."""
        version = self._client.get_registered_model(name).aliases.get(CHAMPION)
        if version is None:
            return None
        return Champion.from_tags(str(version), self._client.get_model_version(name, version).tags)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self._client.set_registered_model_alias(name, alias, version)

    def describe(self, model: Registered, text: str) -> None:
        """Show a card as a version's description, unless a person has written another one there."""
        found = self._client.get_model_version(model.name, model.version).description or ""
        if not found or MADE_BY in found:
            shown = limits.shortened(text, limits.VERSION_DESCRIPTION)
            self._client.update_model_version(model.name, model.version, description=shown)

    def log_evaluation(
        self, models: Iterable[Registered], evaluation: Evaluation, *, measured: ArtifactRef, run_id: str
    ) -> None:
        """Show the evaluation, which is the artifact `measured`, on each LoggedModel as metrics of the run `run_id`."""
        from mlflow.entities import Metric

        # The artifact's own time, so that a repetition logs the same point: MLflow keeps one of two equal points.
        made_ms = int(datetime.fromisoformat(read_manifest(measured).created_at).timestamp() * 1000)
        digest = evaluation.conditions.data_digest or measured.digest
        data = dataset_input("held-out", measured.uri, digest, context="evaluation")
        self._client.log_inputs(run_id, datasets=[data])
        for model in models:
            metrics = [
                Metric(
                    limits.key(key),
                    value,
                    timestamp=made_ms,
                    step=0,
                    model_id=model.model_id,
                    dataset_name="held-out",
                    dataset_digest=short_digest(digest),
                    run_id=run_id,
                )
                for key, value in evaluation.of(model.role).items()
            ]
            if metrics:
                self._client.log_batch(run_id, metrics=metrics)


@contextmanager
def outage_is_infrastructure() -> Iterator[None]:
    """Give MLflow's errors a category: an outage is retried, what a person must change is `config`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise as_stage_error(
            error,
            "models were not registered in MLflow",
            advice="Check that the MLflow server runs and is reachable from the Ray cluster; the task is retried.",
        ) from error
