"""Buttons on the task's page. Each is an XCom that the operator or its trigger writes as soon as the address is known.

Airflow asks every link for its address again when the task's process ends, and overwrites that XCom with the answer.
So the operator remembers the addresses in `link_addresses`, also across a deferral, and the links answer from there.
"""

import logging
import os
from typing import Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from stages.config.errors import without_logins
from stages.config.servers import is_web_address

logger = logging.getLogger(__name__)


class _KnownLink(BaseOperatorLink):
    """A link whose address the operator already knows."""

    @property
    def xcom_key(self) -> str:
        return f"_link_{type(self).__name__}"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return operator.link_addresses.get(self.xcom_key, "")


class RayJobLink(_KnownLink):
    """The job in Ray's dashboard."""

    name = "Ray job"  # pyright: ignore[reportAssignmentType]


class MlflowRunLink(_KnownLink):
    """The stage's run in MLflow."""

    name = "MLflow run"  # pyright: ignore[reportAssignmentType]


class ArtifactLink(_KnownLink):
    """The stage's output in the object store."""

    name = "Artifact"  # pyright: ignore[reportAssignmentType]


class ReportLink(_KnownLink):
    """The run's report, an artifact of the MLflow parent run."""

    name = "Report"  # pyright: ignore[reportAssignmentType]


def mlflow_run_page(tracking_uri: str, run_id: str, experiment_id: str | None = None) -> str:
    """Page of an MLflow run; a user name or password in the tracking URI does not get into the link.

    ATHANOR_MLFLOW_URL is MLflow's address for browsers, where it differs from the one for programs; what is no
    http:// or https:// address is not taken.
    """
    for_browsers = os.environ.get("ATHANOR_MLFLOW_URL", "")
    if for_browsers and not is_web_address(for_browsers):
        logger.warning("ATHANOR_MLFLOW_URL=%r is no http:// or https:// address: links use MLflow's own", for_browsers)
        for_browsers = ""
    base = _base_address(for_browsers or tracking_uri)
    place = f"experiments/{quote(experiment_id)}/runs" if experiment_id else "runs"
    return f"{base}/#/{place}/{quote(run_id)}"


def mlflow_artifact_page(tracking_uri: str, run_id: str, path: str, experiment_id: str) -> str:
    """Page of one artifact; unlike the run's own page, it has no address without the experiment."""
    return f"{mlflow_run_page(tracking_uri, run_id, experiment_id)}/artifacts/{quote(path)}"


def _base_address(uri: str) -> str:
    """People copy the address of a page, so what follows '#' does not count."""
    return without_logins(uri).partition("#")[0].rstrip("/")
