"""The containers' probes and set-up, against small servers that answer as the real ones do."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.deploy import mlflow_server, setup
from infra.deploy.demo import with_packages_of_the_image
from infra.deploy.probe import Unhealthy, check_store, probe
from tests.answering import Asked, answering_json


@contextmanager
def serving(answers: dict[str, Any], seen: list[tuple[str, str, str]] | None = None) -> Iterator[str]:
    """A server whose answers are (status, JSON) by path; requests are noted as (method, authorization, body)."""

    def answer(asked: Asked) -> tuple[int, Any]:
        if seen is not None:
            seen.append((f"{asked.method} {asked.path}", asked.authorization, asked.body.decode()))
        return answers.get(asked.path, (404, {}))

    with answering_json(answer) as url:
        yield url


def report(status: str) -> dict[str, Any]:
    return {"/api/v2/monitor/health": (200, {"triggerer": {"status": status}, "dag_processor": {"status": "healthy"}})}


def test_a_triggerer_without_heartbeat_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(report("unhealthy")) as url:
        monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{url}/execution/")
        assert probe("dag-processor") == "dag_processor healthy"
        with pytest.raises(Unhealthy, match="triggerer is unhealthy"):
            probe("triggerer")


def test_a_server_that_is_away_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(report("healthy")) as url:
        monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{url}/execution/")
    with pytest.raises(OSError, match="refused"):
        probe("triggerer")


def test_the_store_is_probed_and_left_as_it_was(file_store: str) -> None:
    assert check_store(file_store) == file_store
    assert [path for path in Path(file_store.removeprefix("file://")).rglob("*") if path.is_file()] == []


def test_a_store_that_overwrites_is_refused(file_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self, key: str, data: bytes) -> bool:
        self.write_bytes(key, data)
        return True

    monkeypatch.setattr("stages.artifacts.folder.FileStore.put_if_absent", overwrite)
    with pytest.raises(Unhealthy, match="ignores If-None-Match"):
        check_store(file_store)


@pytest.fixture
def mlflow_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "athanor")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p" * 20)
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "a" * 20)
    return monkeypatch


def test_an_account_that_exists_gets_the_password_of_the_environment(mlflow_variables: pytest.MonkeyPatch) -> None:
    exists = (400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "User exists"})
    base = "/api/2.0/mlflow/users"
    seen: list[tuple[str, str, str]] = []
    with serving({f"{base}/create": exists, f"{base}/update-password": (200, {})}, seen) as url:
        mlflow_variables.setenv("MLFLOW_TRACKING_URI", url)
        setup.mlflow()
    admin = "Basic " + base64.b64encode(b"admin:" + b"a" * 20).decode()
    account = json.dumps({"username": "athanor", "password": "p" * 20}, separators=(",", ":"))
    assert seen == [(f"POST {base}/create", admin, account), (f"PATCH {base}/update-password", admin, account)]


def test_a_refused_account_ends_the_set_up_with_the_reason(mlflow_variables: pytest.MonkeyPatch) -> None:
    with serving({"/api/2.0/mlflow/users/create": (403, {"message": "Permission denied"})}) as url:
        mlflow_variables.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(setup.SetupFailed, match=r"403.*Permission denied"):
            setup.mlflow()


def test_airflow_gets_ray_with_its_token_as_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOBS_URL", "http://ray-head:8265")
    monkeypatch.setenv("RAY_TOKEN", "t" * 20)
    monkeypatch.setenv("RAY_URL", "http://localhost:8265")
    made = setup.ray_connection()
    assert (made["conn_type"], made["host"], made["password"]) == ("ray_jobs", "http://ray-head:8265", "t" * 20)
    assert json.loads(str(made["extra"])) == {"dashboard_url": "http://localhost:8265"}


def test_mlflows_accounts_have_a_database_of_their_own_in_a_file_nobody_else_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_AUTH_DATABASE_URI", raising=False)
    file = mlflow_server.write_config(tmp_path, "postgresql+psycopg2://mlflow:a%2Fb@postgres:5432/mlflow")
    assert "database_uri = postgresql+psycopg2://mlflow:a%%2Fb@postgres:5432/mlflow_auth\n" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_the_demo_reads_packages_of_the_image_unless_told_otherwise() -> None:
    made = with_packages_of_the_image("demo", {"alignment": "dpo"})
    assert "apache-airflow-core" not in made["overrides"]["curate.packages"]
    assert made["alignment"] == "dpo"
    chosen = {"overrides": {"curate.packages": ["numpy"]}}
    assert with_packages_of_the_image("demo", chosen) == chosen
    assert with_packages_of_the_image("tiny", {}) == {}
