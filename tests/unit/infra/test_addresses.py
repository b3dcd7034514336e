"""Addresses in the programs of the stack: '#' and '?' in stores, IPv6 hosts, and what is no address."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.demo import addresses
from infra.deploy import environment, setup
from infra.deploy.mlflow_server import account_database
from infra.doctor import doctor, findings
from infra.store_probe import Finding, Verdict, examine
from operators.ray.jobs import RayEndpoint
from stages.artifacts.s3 import S3Store
from stages.config.errors import StageError
from stages.config.graph import Stage


@pytest.mark.parametrize("prefix", ["exp#1", "exp?v=2", "a/exp#1?b"])
def test_the_probe_works_below_the_prefix_that_is_given(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    asked: list[S3Store] = []

    def skew(store: S3Store) -> float:
        asked.append(store)
        raise StageError("far enough")

    monkeypatch.setattr("infra.store_probe._skew", skew)
    list(examine(f"s3://bucket/{prefix}/"))
    assert [(store.bucket, store.prefix) for store in asked] == [("bucket", prefix)]


@pytest.mark.parametrize("uri", ["file:///data/exp#1/artifacts/report/ab", "file:///data/exp%231/artifacts/report/ab"])
def test_the_demo_names_the_report_where_it_is(uri: str) -> None:
    row = SimpleNamespace(name=Stage.REPORT, result=SimpleNamespace(artifact=SimpleNamespace(uri=uri)))
    watch: Any = SimpleNamespace(parameters=dict, links=lambda stage: {})
    snapshot: Any = SimpleNamespace(rows=[row])
    deployment: Any = SimpleNamespace(mlflow_url="http://mlflow", asking="")
    lines = addresses(watch, snapshot, deployment, page="http://airflow/run")
    assert lines[-1].strip() == "/data/exp#1/artifacts/report/ab/report.html"


@pytest.mark.parametrize(("stage", "is_told"), [(Stage.SFT, True), (Stage.REWARD, False)])
def test_the_demo_says_how_to_ask_the_models_of_the_run_when_it_has_some(stage: Stage, is_told: bool) -> None:
    row = SimpleNamespace(name=stage, result=SimpleNamespace(stage=stage))
    watch: Any = SimpleNamespace(parameters=dict, run_id="manual__1 a")
    snapshot: Any = SimpleNamespace(rows=[row], stages=[row])
    deployment: Any = SimpleNamespace(mlflow_url="http://mlflow", asking="make serve RUN=")
    told = "\n".join(addresses(watch, snapshot, deployment, page="http://airflow/run"))
    assert ("make serve RUN='manual__1 a'" in told) == is_told


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("file:///data", "ARTIFACT_STORE"),
        ("s3://", "names no bucket"),
        ("s3://me:s3cret@bucket/a", "holds a user or a password"),
        ("s3://Bucket#1/a", "names no bucket"),
    ],
)
def test_the_set_up_of_a_store_without_a_bucket_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: str, says: str
) -> None:
    monkeypatch.setenv("ARTIFACT_STORE", store)
    assert setup.main(["bucket"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert says in told
    assert "s3cret" not in told


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://ray-head:8265", "http://ray-head:8265"),
        ("http://[fd00::10]:8265/", "http://[fd00::10]:8265"),
        ("https://gate.example.org/ray", "https://gate.example.org/ray"),
        ("https://gate.example.org", "https://gate.example.org"),
    ],
)
def test_airflow_asks_ray_at_the_address_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, asked: str
) -> None:
    monkeypatch.setenv("RAY_JOBS_URL", url)
    monkeypatch.setenv("RAY_TOKEN", "t" * 20)
    monkeypatch.setenv("RAY_URL", "http://localhost:8265")
    made = setup.ray_connection()
    fields: Any = {"conn_id": "r", "port": None, "schema": None, **made, "extra_dejson": json.loads(str(made["extra"]))}
    connection: Any = SimpleNamespace(**fields)
    assert RayEndpoint.from_connection(connection).base_url == asked


@pytest.mark.parametrize(
    ("variable", "address"),
    [("RAY_JOBS_URL", "http://fd00::10:8265"), ("RAY_JOBS_URL", "ray-head:8265"), ("RAY_URL", "ray.example.org")],
)
def test_the_set_up_refuses_addresses_that_would_fail_every_run(
    monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv("RAY_JOBS_URL", "http://ray-head:8265")
    monkeypatch.setenv("RAY_TOKEN", "t" * 20)
    monkeypatch.setenv(variable, address)
    with pytest.raises(setup.SetupFailed, match=f"{variable}='{address}' is not an address"):
        setup.ray_connection()


def about(settings: dict[str, str], subject: str) -> Finding:
    (finding,) = [finding for finding in findings(settings) if finding.subject == subject]
    return finding


@pytest.mark.parametrize(
    ("connection", "asked"),
    [
        ({"host": "::1", "port": 9}, "[::1]:9"),
        ({"host": "[::1]:9/cluster"}, "[::1]:9"),
        ({"host": "http://[::1]:9/cluster"}, "[::1]:9"),
        ("ray-jobs://:t0ken@[::1]:9/http", "[::1]:9"),
        ("ray-jobs://:t0ken@127.0.0.1", "127.0.0.1:8265"),
        ("ray-jobs://:t0ken@http%3A%2F%2F%5B%3A%3A1%5D%3A9%2Fcluster/", "[::1]:9"),
    ],
)
def test_the_doctor_asks_ray_where_airflow_would(connection: Any, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("infra.doctor._ray", lambda url, token: seen.append(url) or [])
    text = connection if isinstance(connection, str) else json.dumps({"conn_type": "ray_jobs", **connection})
    list(findings({"AIRFLOW_CONN_RAY_DEFAULT": text}))
    assert seen[0].startswith(f"http://{asked}")
    assert seen[0].endswith("/cluster") is ("cluster" in text)


@pytest.mark.parametrize(
    "text",
    ['{"host": ', "[]", "{}", '{"host": "a b"}', '{"host": "h", "port": "x"}', "ray-jobs://:t0ken@fd00::10:8265"],
)
def test_a_connection_that_is_none_is_wrong_in_a_sentence(text: str) -> None:
    finding = about({"AIRFLOW_CONN_RAY_DEFAULT": text}, "Ray")
    assert (finding.verdict, "t0ken" in f"{finding}") == (Verdict.WRONG, False)
    assert "ray_default" in finding.what or "AIRFLOW_CONN_RAY_DEFAULT" in finding.what


@pytest.mark.parametrize("variable", ["AIRFLOW_API_URL", "AIRFLOW__CORE__EXECUTION_API_SERVER_URL", "RAY_JOBS_URL"])
@pytest.mark.parametrize("address", ["http://[fd00::10", "http://fd00::10:8080", "http://host:port/execution/"])
def test_the_doctor_tells_an_address_that_is_none_from_a_wrong_server(variable: str, address: str) -> None:
    subject = "Ray" if variable.startswith("RAY") else "Airflow"
    assert "is no address" in about({variable: address}, subject).what


def test_the_doctor_repeats_no_login_of_an_address() -> None:
    lines: list[str] = []
    doctor({"MLFLOW_TRACKING_URI": "http://me:s3cret@127.0.0.1:9", "RAY_JOBS_URL": "x://me:s3cret@h"}, lines.append)
    assert "nothing listens at 127.0.0.1:9" in "\n".join(lines)
    assert "s3cret" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("backend", "made"),
    [
        ("postgresql://u:p%23@[fd00::10]:5432/mlflow", "postgresql://u:p%23@[fd00::10]:5432/mlflow_auth"),
        ("postgresql://u:p#ss@db/mlflow?sslmode=require", "postgresql://u:p#ss@db/mlflow_auth?sslmode=require"),
        ("postgresql://u:p?@db/mlflow?sslrootcert=/a/b", "postgresql://u:p?@db/mlflow_auth?sslrootcert=/a/b"),
        ("sqlite:////data/exp#1/mlflow.db", "sqlite:////data/exp#1/mlflow.db_auth"),
    ],
)
def test_the_account_database_is_next_to_the_other_whatever_the_password_is(backend: str, made: str) -> None:
    assert account_database(backend) == made


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("AIRFLOW_URL=https://athanor.example.org/airflow", False),
        ("MLFLOW_URL=http://[fd00::10]:5000", False),
        ("MLFLOW_URL='http://localhost:5000' # as browsers see it", False),
        ("MLFLOW_URL=http://localhost:5000 # as browsers see it", False),
        ("RAY_URL=http://${HOST}:8265", False),
        ("RAY_URL=", False),
        ("RAY_URL=http://fd00::10:8265", True),
        ("AIRFLOW_URL=athanor.example.org", True),
        ("S3_ENDPOINT=s3.example.org:9000", True),
    ],
)
def test_an_address_in_the_file_that_is_none_is_refused_before_the_start(
    tmp_path: Path, line: str, refused: bool
) -> None:
    file = tmp_path / ".env"
    environment.write(file)
    with file.open("a") as handle:
        handle.write(f"{line}\n")
    found = environment.problems(environment.parse(file.read_text()))
    name = line.partition("=")[0]
    assert [text.split("=")[0] for text in found] == ([name] if refused else [])
