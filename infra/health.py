"""Whether each component really works, asked of the component itself."""

from __future__ import annotations

from datetime import UTC, datetime

import requests

from infra.airflow_api import AirflowApi
from infra.layout import StackRecord, StackSecrets
from infra.supervisor import ProgramState

# component -> the name under which Airflow's health endpoint reports its heartbeat
HEARTBEATS = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}


class Health:
    """Asks each component; an answer of None means healthy, a string says what is missing."""

    def __init__(self, record: StackRecord, secrets: StackSecrets) -> None:
        self._record = record
        self._ray_headers = {"Authorization": f"Bearer {secrets.ray_token}"}
        self.airflow = AirflowApi(record.airflow_url, user="admin", password=secrets.admin_password)

    def missing(self, program: ProgramState) -> str | None:
        """What keeps this program from being healthy, or None."""
        if program.state not in ("STARTING", "RUNNING"):
            return f"{program.state.lower()} {program.why}".strip()
        try:
            match program.name:
                case "ray":
                    return self._answers(f"{self._record.ray_url}/api/jobs/", headers=self._ray_headers)
                case "mlflow":
                    return self._answers(f"{self._record.mlflow_url}/health")
                case "api-server":
                    self.airflow.health()
                    return None
                case name:
                    return self._heartbeat(HEARTBEATS[name], since=program.started_at)
        except requests.RequestException as error:
            return f"does not answer yet ({type(error).__name__})"

    def _answers(self, url: str, *, headers: dict[str, str] | None = None) -> str | None:
        with requests.Session() as session:
            session.trust_env = False
            response = session.get(url, headers=headers, timeout=5)
        return None if response.ok else f"{url} answers {response.status_code}"

    def _heartbeat(self, name: str, *, since: int) -> str | None:
        """Healthy only with a heartbeat of this very process: the last one's may be seconds old after a restart."""
        reported = self.airflow.health()[name]
        last = reported[f"latest_{name}_heartbeat"]
        if reported["status"] != "healthy" or last is None:
            return "no heartbeat yet"
        if datetime.fromisoformat(last) < datetime.fromtimestamp(since, UTC):
            return "no heartbeat since its start"
        return None
